"""How fast a rotation under test goes: what takes weeks in service takes seconds here.

No product code knows it: the variants of `variants.py` read it from their environment.
"""

import os
from collections.abc import Mapping
from typing import Final

import msgspec
from msgspec import Struct

from keys.keyring import RotationPolicy

_VARIABLE: Final = "FAULTS_PACE"

TOKEN_LIFETIME: Final = 60
"""Seconds; no setting allows less."""

CLOCK_SKEW: Final = 5
"""Seconds; no setting allows less."""


class Pace(Struct, frozen=True, kw_only=True):
    """Durations in seconds. The publish lead stands for the 24 h of an installation."""

    publish_lead: float
    rotation_period: float
    ring_poll: float
    jwks_max_age: int = 10
    clock_skew: int = CLOCK_SKEW

    @property
    def policy(self) -> RotationPolicy:
        """What the rotator goes by."""
        return RotationPolicy(
            publish_lead=self.publish_lead,
            rotation_period=self.rotation_period,
            lifetime_cap=TOKEN_LIFETIME,
            clock_skew=self.clock_skew,
        )

    def environ(self) -> Mapping[str, str]:
        """Return the settings of an instance that goes at this pace."""
        return {
            "PRIVYSEAL_TOKEN_LIFETIME": str(TOKEN_LIFETIME),
            "PRIVYSEAL_JWKS_MAX_AGE": str(self.jwks_max_age),
            "PRIVYSEAL_CLOCK_SKEW": str(self.clock_skew),
            _VARIABLE: msgspec.json.encode(self).decode(),
        }


def pace_of_this_process() -> Pace:
    """Return what `environ` put into the environment."""
    return msgspec.json.decode(os.environ[_VARIABLE], type=Pace)
