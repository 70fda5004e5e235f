"""A look at the first blocks before a start."""

from __future__ import annotations

from ingesting import fasta, spec_of
from longseq_data.ingest.survey import survey
from longseq_data.readers.reading import Reading
from longseq_data.splits import SplitRule


def test_a_survey_before_a_start_parses_nothing_that_is_kept(cache, write, monkeypatch) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 300, i) + b">odd\nMKVJB\n") for i in range(3)]
    rule = SplitRule(0.2, 0.1, "sequence")
    alone = survey(Reading(), sources, strict=False, rule=rule)
    assert (alone.records, alone.residues, alone.complete) == (903, 3 * (90_000 + 5), True)
    assert alone.unknown == {"J": 3}
    assert [note.partition(" is read as")[0] for note in alone.notes] == [
        f"{source}, line 601: 'J' in record 'odd'" for source in sources
    ]
    monkeypatch.setattr("longseq_data.ingest.follow.parsed", None)
    spec_of(*sources, cache=cache).begin()
    for _ in range(2):  # while blocks come, and from those that are there
        assert survey(Reading(), sources, strict=False, rule=rule, cache=str(cache)) == alone


def test_a_survey_of_many_files_waits_for_none_that_is_far_down_the_list(cache, write, monkeypatch) -> None:
    sources = [write(f"{i}.fasta", fasta(str(i), 3, i)) for i in range(40)]
    monkeypatch.setattr("longseq_data.ingest.follow.Road._tend", lambda *nothing: None)  # nobody makes blocks
    alone = survey(Reading(), sources, strict=False)
    assert survey(Reading(), sources, strict=False, cache=str(cache)) == alone
    assert alone.records == 120
