"""What a visitor asks for, on its way from the page to the process that does it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ..options import Format, HubAccess, Options, PublishTarget, QuantMethod, ZeroPointReading


@dataclass(frozen=True)
class Order:
    """A repository to plan or, with a `target`, to convert and publish. The token is nobody else's to see.

    `local_user` says that it comes from the user of this computer, whose login and cache it may use; without, there is
    no more than the token.
    """

    source: str
    revision: str | None = None
    format: Format = Format.AUTO
    zero_points: ZeroPointReading | None = None
    quant_method: QuantMethod = QuantMethod.GPTQ
    target: PublishTarget | None = None
    force: bool = False
    local_user: bool = False
    token: str | None = field(default=None, repr=False)

    @property
    def options(self) -> Options:
        """Return how to convert: always verified, with no more of the source on the disk than is at work."""
        return Options(
            device="cpu", format=self.format, zero_points=self.zero_points, quant_method=self.quant_method,
            verify=True, force=self.force, low_disk=self.target is not None, target=self.target,
        )  # fmt: skip

    def access(self, **where: Any) -> HubAccess:
        return HubAccess(self.revision, self.token, **where)

    def without_token(self) -> Order:
        return replace(self, token=None)

    def as_line(self) -> str:
        """Return it as one line of JSON, with the token."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def of_line(cls, line: str) -> Order:
        fields = json.loads(line)
        target, reading = fields.pop("target"), fields.pop("zero_points")
        return cls(
            **{**fields, "format": Format(fields["format"]), "quant_method": QuantMethod(fields["quant_method"])},
            target=None if target is None else PublishTarget(**target),
            zero_points=None if reading is None else ZeroPointReading(reading),
        )
