"""What is said of a setting, on a config that the package does not know: an architecture's own."""

import math
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from saemill.commands.flags import argument, command, flag
from saemill.common.config import build
from saemill.common.errors import ConfigError
from saemill.common.setting import about, axes, check, identity, like, of, setting, written


@dataclass(frozen=True, slots=True, kw_only=True)
class Jump:
    """Settings of an architecture."""

    bandwidth: tuple[float, ...] = setting((0.001,), "Width of the kernel", axis="bw", least=0)
    start: float = setting(0.1, "Threshold at the start", within="(0, 1]")
    sparsity: Literal["step", "tanh"] = setting("step", "What counts latents")
    kernels: tuple[Literal["box", "bump"], ...] = setting(("box",), "Shape of the kernel", axis="")

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    """Settings of a command."""

    acts: Path = field(metadata=about("Where from", decides=False))
    seed: int = setting(500_000, "Seed", least=0, most=2**63 - 1)
    every: int | None = setting(None, "Steps between looks", by_default="a tenth", decides=False, least=1)
    is_quiet: bool = setting(False, "Say nothing", decides=False)
    jump: Jump = setting(Jump(), "Of the architecture")
    unmarked: int = 3

    def __post_init__(self) -> None:
        check(self)


made: list[Toy] = []
app = typer.Typer(add_completion=False)


@app.command()
@command(
    Toy,
    "train",
    argument("acts"),
    *("seed", "jump.bandwidth", "jump.sparsity", "jump.kernels"),
    flag("every", "-e", "--every", help="Steps"),
    flag("is_quiet", "--quiet"),
)
def toy(config: Toy) -> None:
    """Make it."""
    made.append(config)


def told(*words: str) -> Toy:
    """The settings that the command makes of words."""
    result = CliRunner().invoke(app, list(words), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return made[-1]


def test_flags_and_their_help_come_from_the_settings() -> None:
    """Oracle: names, what stands for a value, and help, by hand, in the order of the command's list."""
    params = typer.main.get_command(app).params
    assert [(*param.opts, param.metavar, param.help) for param in params[:7]] == [
        ("acts", None, "Where from."),
        ("--seed", "N", "Seed [500k]."),
        ("--bandwidth", "X,…", "Width of the kernel [0.001]."),
        ("--sparsity", "NAME", "What counts latents: step or tanh [step]."),
        ("--kernels", "NAME,…", "Shape of the kernel: one or more of box, bump [box]."),
        ("-e", "--every", "N", "Steps [a tenth]."),
        ("--quiet", None, "Say nothing."),
    ]
    assert [param.opts for param in params[7:]] == [["--config"], ["--set"]]


def test_words_become_settings() -> None:
    """Oracle: the settings by hand; what is not named is as by default."""
    words = ("a", "--bandwidth", "0.1,0.2", "--sparsity", "tanh", "-e", "2k", "--quiet", "--seed", "7")
    jump = Jump(bandwidth=(0.1, 0.2), sparsity="tanh")
    assert told(*words) == Toy(acts=Path("a"), seed=7, every=2000, is_quiet=True, jump=jump)
    assert told("a") == Toy(acts=Path("a"))


def test_set_reaches_what_has_no_flag() -> None:
    """Oracle: the value by hand."""
    assert told("a", "--set", "jump.start=1").jump.start == 1.0


def test_identity_is_what_decides() -> None:
    """Oracle: the settings by hand, a group whole; a plain field decides."""
    assert identity(Toy(acts=Path("a"), every=5)) == {
        "seed": 500_000, "jump": {"bandwidth": [0.001], "start": 0.1, "sparsity": "step", "kernels": ["box"]},
        "unmarked": 3,
    }  # fmt: skip


def test_axes() -> None:
    """Oracle: the lists whose values form a grid, with their signs in a name."""
    assert (axes(Jump), axes(Toy)) == ({"bandwidth": "bw", "kernels": ""}, {})


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Jump, {"bandwidth": [1, -1]}, "bandwidth must be 0 or more, got -1.0"),
        (Jump, {"start": 0}, "start must be in (0, 1], got 0.0"),
        (Jump, {"start": 1.5}, "start must be in (0, 1], got 1.5"),
        (Toy, {"acts": "a", "seed": -1}, "seed must be 0 or more, and at most 2^63 - 1, got -1"),
        (Toy, {"acts": "a", "every": 0}, "every must be 1 or more, got 0"),
        (Toy, {"acts": "a", "jump": {"start": 0}}, "start must be in (0, 1], got 0.0"),
    ],
)
def test_numbers_out_of_bounds(kind: Any, values: dict[str, Any], message: str) -> None:
    """Oracle: the message by hand."""
    with pytest.raises(ConfigError) as caught:
        build(kind, values)
    assert str(caught.value) == message


def test_bounds_themselves_and_what_is_left_open_pass() -> None:
    """Oracle: the ends of each interval, by hand; NaN is in none."""
    build(Jump, {"bandwidth": [0], "start": 1})
    build(Toy, {"acts": "a", "seed": 2**63 - 1, "every": 1})
    build(Toy, {"acts": "a", "every": None})
    for values in ({"start": math.nan}, {"bandwidth": (math.nan,)}):
        with pytest.raises(ConfigError):
            Jump(**values)


def test_one_value_of_anothers_setting() -> None:
    """Oracle: default, help and bounds by hand; of a list the first value."""

    @dataclass(frozen=True, kw_only=True)
    class One:
        bandwidth: float = like(Jump, "bandwidth", least=0.5, default=0.5)
        start: float = like(Jump, "start", default=MISSING)
        width: float = like(Jump, "bandwidth")

        def __post_init__(self) -> None:
            check(self)

    one = One(start=0.5)
    assert (one.bandwidth, one.width, of(One)["width"].help) == (0.5, 0.001, "Width of the kernel")
    assert axes(One) == {}
    with pytest.raises(TypeError, match="start"):
        One()
    with pytest.raises(ConfigError, match=r"bandwidth must be 0\.5 or more, got 0\.4"):
        One(start=0.5, bandwidth=0.4)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (32, "32"), ((0.8, 0.95), "0.8,0.95"), (1_000, "1000"), (100_000, "100k"), (1_000_000, "1M"),
        (262_144, "262144"), (10**9, "1B"), (0.0, "0"), (0.0005, "0.0005"), ("auto", "auto"), (True, "on"),
        (False, ""), (None, ""), ((), ""), (MISSING, ""), (Jump(), ""),
    ],
)  # fmt: skip
def test_defaults_as_help_shows_them(value: Any, expected: str) -> None:
    """Oracle: the text by hand."""
    assert written(value) == expected
