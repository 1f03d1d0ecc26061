"""What a refused command says, and how it ends."""


def refused(said, code: int, *texts: str, lines: int = 1) -> None:
    """Nothing on stdout, one line on stderr that holds the texts, and the exit code."""
    assert (said.code, said.out) == (code, ""), said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == lines, said.err
    assert "Traceback" not in said.err
    for text in texts:
        assert text in said.err
