"""The role of a site: what is there, as `common.models.site_roles` finds it and a site's records keep it."""

from typing import Literal

from saemill.common.records import Record


class Role(Record):
    """What is at a site, told by arithmetic on a few tokens (`common.models.site_roles`)."""

    kind: Literal[
        "residual", "holds_residual", "norm_of_residual", "added", "added_after_norm", "part", "within"
    ]
    module: str | None = None
    """Path of the module that added last to the residual stream, that norms what is added, or that adds what
    this is a part of, by `kind`."""
    factor: float = 1.0
    """What it is multiplied by before it is added."""
    beside: tuple[str, ...] = ()
    """Paths of the modules whose outputs are added in the same place."""

    @property
    def described(self) -> str:
        """Say what it is, in words."""
        times = "" if self.factor == 1 else f", times {self.factor:.3g}"
        beside = f", together with {' and '.join(self.beside)}" if self.beside else ""
        return {
            "residual": "the residual stream",
            "holds_residual": f"the whole residual stream, with what {self.module} adds to it",
            "norm_of_residual": "a norm of the residual stream",
            "added": f"added to the residual stream{times or ' as it is'}{beside}",
            "added_after_norm": f"added to the residual stream after {self.module}{times}{beside}",
            "part": f"a part of {self.module}, which is the sum of it{times} and {' and '.join(self.beside)}",
            "within": f"within {self.module}",
        }[self.kind]
