"""Configurations, job templates and site profiles: at the root of a checkout, inside the package of a wheel."""

from __future__ import annotations

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class FilesHook(BuildHookInterface):
    """An editable installation finds them in its checkout; a copy of them would go stale."""

    def initialize(self, version: str, build_data: dict) -> None:
        if version == "standard":
            build_data["force_include"]["slurm"] = "longseq/launch/slurm/files"
            build_data["force_include"]["configs"] = "longseq/config/files"
