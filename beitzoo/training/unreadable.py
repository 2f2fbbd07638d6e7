"""Images that could not be read in a run: they are left out, and named once."""

import logging
from dataclasses import dataclass, field

from beitzoo.training.processes import Processes

_logger = logging.getLogger(__name__)


@dataclass
class Unreadable:
    """Files that could not be read so far, with the reason.

    Attributes:
        processes: Those that train together; each meets others.
        reasons: By the identity of the image.
    """

    processes: Processes
    reasons: dict[str, str] = field(default_factory=dict)
    _reported: set[str] = field(default_factory=set)

    def add(self, found: list[tuple[str, str]]) -> None:
        """Take in what one batch left out."""
        self.reasons.update(found)

    def report(self) -> None:
        """Name those that are new; all processes call this."""
        for found in self.processes.gather(self.reasons):
            self.reasons |= found
        for path in sorted(self.reasons.keys() - self._reported):
            if self.processes.is_main:
                _logger.warning("Left out %s: %s.", path, self.reasons[path])
        self._reported |= self.reasons.keys()
