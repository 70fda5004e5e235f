"""The pages speak of what there is: verbs, options, keys, files, messages, curves; and their links lead somewhere."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import textwrap
from itertools import chain
from pathlib import Path

import pytest
import yaml

from documentation.pages import MADE, ROOT, blocks, text_of_all, written
from longseq.cli import VERBS, main
from longseq.commands.bench import BENCHMARKS
from longseq.commands.benchmark import BENCHMARKS as MODEL_BENCHMARKS
from longseq.commands.data import ACTIONS
from longseq.config.loading import described_keys
from longseq.config.schema import Config
from longseq.errors import EXIT_CODES
from longseq.launch.slurm.site import Site, load_site
from longseq_data.prepare.config import PrepareConfig

TEXT = text_of_all()
# Options of other programs that the pages show.
OTHERS = {"--logdir", "--mail-type", "--ntasks"} | {"--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint"}
OTHERS |= {"--max-restarts"}


def help_of(*words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    return capsys.readouterr().out


def test_the_readme_fits_on_two_screens():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_verb_benchmark_and_action_on_data_is_in_the_pages():
    for name in VERBS:
        assert re.search(rf"longseq {name}\b", TEXT), name
    for name in BENCHMARKS:
        assert re.search(rf"bench {name}\b", TEXT), name
    for name in MODEL_BENCHMARKS:
        assert re.search(rf"benchmark {name}\b", TEXT), name
    for name in ACTIONS:
        assert re.search(rf"data {name}\b", TEXT), name


def test_every_option_in_the_pages_is_one_of_a_verb(capsys):
    groups = [(verb,) for verb in VERBS], [("bench", name) for name in BENCHMARKS], [("data", name) for name in ACTIONS]
    groups += ([("benchmark", name) for name in MODEL_BENCHMARKS],)
    known = set()
    for words in chain(*groups):
        known |= set(re.findall(r"--[a-z][a-z-]+", help_of(*words, capsys=capsys)))
    pages = [page for page in written() if page.name != "CONTRIBUTING.md"]  # which speaks of pytest and ruff
    used = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(page.read_text() for page in pages)))
    example = {"--nodes", "--steps"}  # of tests/cluster/slurm.py and the examples
    example |= {"--include", "--tasks"}  # of lm_eval
    assert used - known - OTHERS - example == set()


def test_every_key_in_the_pages_is_one_of_a_configuration():
    known = {f"{section}.{name}" for section, name, _ in described_keys()}
    sections = "|".join(sorted(vars(Config())))
    used = set(re.findall(rf"(?<![\w./])((?:{sections})\.[a-z_]+)\b(?![./(])", TEXT))
    assert len(used) > 60
    files = {"data.json", "model.safetensors", "data.md", "model.md", "attention.md", "run.md"}
    assert {name for name in used - known - files if not name.startswith("deepspeed.")} == set()


def test_every_configuration_is_in_the_pages_and_the_other_way_round():
    named = set(re.findall(r"[a-z0-9_-]+\.yaml", TEXT))
    there = {path.name for path in (*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("slurm/sites/*.yaml"))}
    generic = {"config.yaml", "other.yaml", "mycluster.yaml", ".pre-commit-config.yaml", "-pre-commit-config.yaml"}
    assert named - there - generic - {"pre-commit-config.yaml"} == set()
    prepare = {path.name for path in ROOT.glob("configs/prepare/*.yaml")}  # named as a whole
    assert there - named - prepare == set()


def test_files_and_folders_that_the_pages_link_to_exist():
    """Inside docs/ the site's build looks at anchors as well; it does not see links from and to elsewhere."""
    for page in (*written(), *ROOT.glob("*.md"), *ROOT.glob("examples/*.md")):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if not target.startswith("http"):
                place = page.parent / target
                made = place.parent.name == "reference" and place.name in MADE
                assert made or place.exists(), f"{page.relative_to(ROOT)}: {target}"


def test_anchors_of_links_from_the_readme_into_the_pages_exist():
    readme = (ROOT / "README.md").read_text()
    found = re.findall(r"\]\((docs/[^)#]+)#([^)]+)\)", readme)
    assert found
    for target, anchor in found:
        headings = re.findall(r"^#+ (.*)$", (ROOT / target).read_text(), re.MULTILINE)
        slugs = {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
        assert anchor in slugs, f"{target}#{anchor}"


def messages_of_the_code() -> list[str]:
    """Every text of the sources, with … for what is filled in."""
    texts = []
    for path in (*ROOT.glob("platform/**/*.py"), *ROOT.glob("pipelines/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    for path in (ROOT / "slurm").glob("*.j2"):
        texts += [re.sub(r"\$\{.*?\}|\{\{.*?\}\}|\$\w+", "…", line).replace("\\`", "`") for line in path.open()]
    return texts


def test_every_message_on_the_page_of_messages_is_one_of_the_code():
    page = (ROOT / "docs/troubleshooting.md").read_text()
    messages = re.findall(r"^### `(.*)`$", page, re.MULTILINE)
    assert len(messages) > 25
    texts = messages_of_the_code()
    for message in messages:
        pattern = ".*".join(re.escape(part) for part in message.split("…"))
        assert any(re.search(pattern, text, re.DOTALL) for text in texts), message


def test_the_profile_of_the_cluster_tutorial_is_one(tmp_path):
    (profile,) = [b.text for b in blocks(ROOT / "docs/tutorials/cluster.md") if b.language == "yaml"]
    (tmp_path / "site.yaml").write_text(profile)
    site = load_site(str(tmp_path / "site.yaml"))
    assert (site.partition, site.gpus_per_node, site.environment) == ("gpu", 8, {"NCCL_SOCKET_IFNAME": "ib0"})


def test_the_made_pages_hold_every_key_verb_option_and_exit_code(tmp_path, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import reference
    finally:
        sys.path.pop(0)
    monkeypatch.setattr(reference, "PAGES", tmp_path)
    reference.main()
    assert {path.name for path in tmp_path.iterdir()} == MADE
    keys, verbs, codes, costs = ((tmp_path / f"{n}.md").read_text() for n in ("keys", "verbs", "exit-codes", "costs"))
    for section, name, about in described_keys():
        assert f"| `{section}.{name}` |" in keys
        assert about["meaning"].split(";")[0].split("*")[0].split("|")[0].split("<")[0].rstrip() in keys
    for schema in (PrepareConfig, Site):
        assert all(f"| `{name}` |" in keys for name in vars(schema()))
    several = {"bench": BENCHMARKS, "data": ACTIONS, "benchmark": MODEL_BENCHMARKS}
    for words in [*((v,) for v in VERBS), *((verb, name) for verb, names in several.items() for name in names)]:
        assert re.search(rf"^#+ {' '.join(words)}$", verbs, re.MULTILINE), words
        options = set(re.findall(r"^  (?:-\w[^,]*, )?(--[a-z][a-z-]+)", help_of(*words, capsys=capsys), re.MULTILINE))
        assert all(option in verbs for option in options - {"--help"}), words
    assert all(re.search(rf"^\| {code} \|", codes, re.MULTILINE) for code in EXIT_CODES)
    trainings = [p for p in ROOT.glob("configs/*/*.yaml") if p.parent.name not in ("prepare", "experiments")]
    assert all(f"`{path.relative_to(ROOT)}`" in costs for path in trainings)


def test_exit_codes_in_the_code_are_those_of_the_table():
    from longseq import errors

    named = {value for name, value in vars(errors).items() if name.startswith("EXIT_") and isinstance(value, int)}
    assert named <= EXIT_CODES.keys()


def test_version_and_files_for_contributors_agree():
    from longseq import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    for path in ROOT.glob(".github/**/*.yml"):
        assert yaml.safe_load(path.read_text()), path
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [hook["id"] for repository in hooks["repos"] for hook in repository["hooks"]]


def test_the_recipe_of_the_image_is_clean():
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint, of the dev extra on x86-64")
    subprocess.run([hadolint, ROOT / "containers/Dockerfile"], check=True)


def test_the_recipe_of_the_container_has_a_clean_script(tmp_path):
    recipe = (ROOT / "containers/longseq.def").read_text()
    (script,) = re.findall(r"^%post\n(.*?)^%", recipe, re.MULTILINE | re.DOTALL)
    (tmp_path / "post.sh").write_text("#!/bin/sh\n" + textwrap.dedent(script))
    if shutil.which("shellcheck") is None:
        pytest.skip("needs shellcheck")
    subprocess.run(["shellcheck", tmp_path / "post.sh"], check=True)
