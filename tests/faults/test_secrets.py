"""No tracked file holds a key, token or password."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATTERNS = {
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{20,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_[A-Za-z0-9_]{30,}",
    "AWS key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "Google key": r"\bAIza[0-9A-Za-z_-]{35}",
    "PyPI token": r"\bpypi-[A-Za-z0-9_-]{40,}",
    "OpenAI or Anthropic key": r"\bsk-[A-Za-z0-9_-]{32,}",
    "Slack token": r"\bxox[abposr]-[A-Za-z0-9-]{10,}",
    "password in a URL": r"\b[a-z][a-z0-9+.-]*://[^\s/:@'\"{}<>$]+:[^\s/@'\"{}<>$]+@[A-Za-z0-9]",
    "assigned secret": r"(?i)\b(?:api_?key|secret|passwd|password|auth_?token)\b\s*[:=]\s*"
    r"[\"'][A-Za-z0-9+/_-]{16,}[\"']",
}
SAMPLES = {
    "Hugging Face token": "hf_" + "a1B2" * 6,
    "private key": "-----BEGIN RSA " + "PRIVATE KEY-----",
    "GitHub token": "ghp_" + "a1B2" * 9,
    "AWS key": "AKIA" + "ABCD1234" * 2,
    "Google key": "AIza" + "a1B2c" * 7,
    "PyPI token": "pypi-" + "a1B2" * 12,
    "OpenAI or Anthropic key": "sk-" + "a1B2" * 9,
    "Slack token": "xoxb-" + "1234567890-a",
    "password in a URL": "https://me:" + "word@host/x",
    "assigned secret": "password = '" + "a1B2" * 5 + "'",
}


def secrets_in(text: str) -> list[str]:
    return [name for name, pattern in PATTERNS.items() if re.search(pattern, text)]


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    return [ROOT / name for name in listed.decode().split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("name", PATTERNS)
def test_each_pattern_finds_its_kind(name):
    assert name in secrets_in(f"x = 1\n{SAMPLES[name]}\n")


def test_no_tracked_file_holds_a_secret():
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = tracked()
    assert len(files) > 200
    found = {str(path.relative_to(ROOT)): kinds for path in files if (kinds := secrets_in(path.read_text("latin-1")))}
    assert found == {}
