"""`lowlevel losses --plot`: the lines are the losses and their derivatives."""

import struct
from pathlib import Path

import pytest
import torch
from losses_table import document, refused, shown
from matplotlib.figure import Figure

from lowlevel.inspection.loss_curves import curve, make_figure
from lowlevel.inspection.loss_points import Point, evaluate
from lowlevel.losses import LOSSES


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_the_plot_is_a_png_of_1200_x_600(cli, tmp_path):
    path = tmp_path / "curves.png"
    assert f"curves written to {path}" in shown(cli, "--plot", path)
    assert png_size(path) == (1200, 600)
    (row,) = document(cli, "--plot", tmp_path / "one.PNG", "--loss", "hinge")["losses"]
    assert row["name"] == "hinge"
    assert png_size(tmp_path / "one.PNG") == (1200, 600)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "one.PNG"]
    assert path.read_bytes() != (tmp_path / "one.PNG").read_bytes()


def figure_at(point: Point, **settings: float):
    rows = [
        evaluate(name, point, {k: v for k, v in settings.items() if k in LOSSES[name].parameters}) for name in LOSSES
    ]
    return rows, make_figure(rows, point)


def test_every_loss_has_its_line_its_entry_in_the_legend_and_its_own_look():
    rows, figure = figure_at(Point(), label_smoothing=0.1)
    labels = [text.get_text().replace("\n", " ").replace("\xa0", " ") for text in figure.legends[0].get_texts()]
    names = [entry.split(" ")[0] for label in labels for entry in label.split(" = ")]
    assert sorted(names) == sorted(LOSSES)
    assert "cdpo (eps 0.1) = aot (eps 0.1) = aot_unpaired (eps 0.1)" in labels
    for axis in figure.axes:
        lines = [line for line in axis.lines if len(line.get_xdata()) > 2]
        assert len(lines) == len(labels) == len(LOSSES) - 2
        assert len({(line.get_color(), line.get_linestyle(), line._dash_pattern[1] and tuple(line._dash_pattern[1]))
                    for line in lines}) == len(lines)  # fmt: skip
    assert [axis.get_xlabel() for axis in figure.axes] == ["margin = beta (a - b)"] * 2
    assert [axis.get_ylabel().split("  ")[0] for axis in figure.axes] == ["loss", "d loss / d margin"]
    assert len({row.margin for row in rows}) == 1


def test_identical_curves_share_a_line():
    _, figure = figure_at(Point())
    labels = [text.get_text().replace("\n", " ").replace("\xa0", " ") for text in figure.legends[0].get_texts()]
    assert labels[0] == "sigmoid = cdpo (eps 0) = robust (eps 0) = aot (eps 0) = aot_unpaired (eps 0)"
    assert labels[1:3] == ["hinge", "ipo"]


@pytest.mark.parametrize("name", LOSSES)
def test_the_lines_are_the_loss_and_its_derivative(name):
    """Against -ls(x) by hand for sigmoid, and for all against the difference quotient of the loss along the path."""
    point, step = Point(-10, -12, -11, -11.5, 4, 5), 1e-5
    row = evaluate(name, point, {"beta": 0.2})
    figure = make_figure([row], point)
    (losses, slopes) = (axis.lines[0] for axis in figure.axes)
    x = torch.tensor(losses.get_xdata(), dtype=torch.float64)
    assert (x[0].item(), x[-1].item(), len(x)) == (-4, 4, 241)
    if name == "sigmoid":
        torch.testing.assert_close(torch.tensor(losses.get_ydata()), torch.log1p(torch.exp(-x)), rtol=0, atol=1e-12)
        torch.testing.assert_close(torch.tensor(slopes.get_ydata()), -1 / (1 + torch.exp(x)), rtol=0, atol=1e-12)
    kinks = {"hinge": 1.0, "dpop": -0.1}.get(name)  # dpop: a = 0.25 + x / (2 beta) = 0
    for i in range(0, 241, 7):
        if kinks is None or abs(x[i] - kinks) > 1e-3:
            low, high = (p.loss for p in curve(row, point, [x[i].item() - step, x[i].item() + step]))
            quotient = (high - low) / (2 * step)
            assert slopes.get_ydata()[i] == pytest.approx(quotient, rel=1e-5, abs=1e-6), x[i]
    (here,) = curve(row, point, [row.margin])
    assert here.loss == pytest.approx(row.loss, rel=1e-12)
    assert here.margin == pytest.approx(row.margin, rel=1e-12)


def test_the_plot_reaches_the_given_point():
    point = Point(chosen=-200)
    row = evaluate("sigmoid", point, {})
    figure = make_figure([row], point)
    (low, high) = (figure.axes[0].lines[0].get_xdata()[i] for i in (0, -1))
    assert low < row.margin < high
    assert figure.axes[0].lines[1].get_xdata()[0] == row.margin


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("curves.pdf", "must end in .png"),
        ("curves", "must end in .png"),
        ("none/curves.png", "No such file or directory"),
        ("file/curves.png", "Not a directory"),
        ("folder.png", "Is a directory"),
    ],
)
def test_paths_that_cannot_be_written(cli, tmp_path, name, message):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    refused(cli("losses", "--plot", tmp_path / name), message, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_plot_that_fails_leaves_the_old_file(cli, tmp_path, monkeypatch):
    path = tmp_path / "curves.png"
    path.write_bytes(b"old")

    def fail(self, target, **_):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    refused(cli("losses", "--plot", path), "No space left on device")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("curves.png", b"old")]


def test_a_mistake_is_noticed_before_anything_is_written(cli, tmp_path):
    refused(
        cli("losses", "--plot", tmp_path / "x.png", "--loss", "sigmoid", "--rpo-alpha", 1), "does not use rpo_alpha"
    )
    assert not list(tmp_path.iterdir())
