"""An annotation from its first sample to its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lowlevel.annotation.agreement import report
from lowlevel.annotation.journal import open_journal
from lowlevel.annotation.pairs import Pair
from lowlevel.annotation.replies import describe_runs, read_prompts, sample_pairs
from lowlevel.annotation.server import AnnotationServer
from lowlevel.data.messages import digest
from lowlevel.errors import DataError
from lowlevel.heartbeat import paused
from lowlevel.running.reopening import Note
from lowlevel.running.replies import Sampling


def annotate(
    runs: Sequence[Path], source: str, out: Path, sampling: Sampling, note: Note, *, resume: bool, port: int
) -> None:
    """Sample pairs, or read those of the journal with `resume`; serve them until Ctrl-C; print the report.

    Raises ConfigError and DataError as `open_journal`, `describe_runs` and `read_prompts` do; DataError without a pair.
    """
    prompts = read_prompts(source)
    header = {
        "runs": describe_runs(runs),
        "prompts": {"source": source, "sha256": digest([messages for _, messages in prompts])},
        "sampling": asdict(sampling),
    }

    def sample() -> tuple[list[Pair], Counter[str]]:
        pairs, left_out = sample_pairs(runs, prompts, sampling, note)
        for reason, count in left_out.items():
            note(f"{count} of {len(prompts)} prompts left out: {reason}")
        if not pairs:
            raise DataError(f"{source}: no prompt has two different replies to judge; raise --temperature")
        return pairs, left_out

    with AnnotationServer(port) as server, open_journal(out, header, sample, resume=resume) as journal:
        server.journal = journal
        note(f"pairs for every annotator: {len(journal.pairs)}; saved in {journal.path} at once; Ctrl-C ends")
        note(server.url)
        try:
            with paused():
                server.serve_forever()
        except KeyboardInterrupt:
            note("")
        note(report(journal))
        note(f"{journal.write_preferences()} preference rows in {out}")
