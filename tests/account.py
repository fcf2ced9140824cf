"""What became of each order of a round, and which faults explain that an order was done twice."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from tests.harness import Script
from tests.process_group import ProcessGroup

# What docs/guarantees.md says of each kind of fault; it says of all others that they have no effect.
LOSES = {"script killed", "server killed", "leader killed", "durable deleted", "DLQ durable deleted"}
LOSES |= {"shut down without a server"}
INTERRUPTS = {"cut", "black hole", "suspended"}  # orders may be done twice if it takes too long
LENGTHENS = {"step-down", "restart", "lame duck"}  # no effect alone, but an interruption takes longer by this
REDRIVE = "redrive interrupted"
VANISHED = "dead letter removed by the server"

MAX_INTERRUPTION = 3.0  # seconds without an effect
ACK_TIME = 1.0  # seconds after an order is done in which its ack may not be confirmed
RECOVERY_TIME = 1.0  # seconds after a fault in which its effects may show
CONFIRM_TIME = 10.0  # seconds in which a shutdown waits for acks to be confirmed
SEARCH_TIME = 60.0  # seconds until a DLQ processor has found what an interrupted redrive left

EVENT = re.compile(r"(begun|done|failed) (order-\d+) at ([\d.]+)")
BAD = re.compile(r"^Traceback|never awaited|never retrieved|Exception ignored|cannot be stopped|callback failed")
# The last lines of a script that ends with exit status 1 as documented.
EXCUSES = re.compile(
    r"cannot connect to|cannot create|are not published|has not finished|skipped$|no stream|is missing|not confirmed"
)


@dataclass(eq=False)
class Fault:
    """What was broken from when to when; without `hit`, every process was hit."""

    kind: str
    start: float
    hit: Collection[Script] = ()
    end: float = math.inf


@dataclass(eq=False)
class Attempt:
    """A process's work on an order, which lasts until `ended`, if that was heard."""

    script: Script
    is_reprocess: bool
    begun: float
    ended: float = math.inf
    failed: bool = False

    def failed_before(self, when: float) -> bool:
        return self.failed and self.ended <= when


@dataclass
class Account:
    """The result of a round."""

    orders: int = 0
    done: int = 0
    reprocessed: int = 0
    causes: Counter[str] = field(default_factory=Counter)  # of orders that were done twice
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        causes = ", ".join(f"{cause} {count}" for cause, count in self.causes.most_common())
        doubles = f"{self.causes.total()} doubles" + (f" ({causes})" if causes else "")
        result = f"{len(self.problems)} PROBLEMS" if self.problems else "ok"
        return f"{self.orders} orders: {self.done} done, {self.reprocessed} reprocessed, {doubles}: {result}"


class Accountant:
    """Knows the processes of a round and what they were hit by."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.faults: list[Fault] = []
        self.signalled: set[Script] = set()  # with SIGTERM, or SIGKILL
        self.sent: set[str] = set()  # orders that a publisher may have published
        self.published: set[str] = set()  # those of which it said so

    def account(self) -> Account:
        """Check that each order was done, and twice only where that is documented, and how each process ended."""
        attempts = self._attempts()
        done = {order for order, tries in attempts.items() if any(_is_done(one) for one in tries)}
        again = {order for order, tries in attempts.items() if any(_is_done(one) and one.is_reprocess for one in tries)}
        result = Account(len(self.published), len(done - again), len(again))
        lost = self.published - done
        if vanished := {order for order in lost if self._was_removed(order)}:
            result.causes[VANISHED] += len(vanished)
        if lost := lost - vanished:
            result.problems.append(f"{len(lost)} lost:\n{self._story(lost, attempts)}")
        if made_up := set(attempts) - self.sent:
            result.problems.append(f"made up: {made_up}")
        unexplained = set()
        for order, tries in attempts.items():
            causes = list(self._causes(tries))
            result.causes.update(cause or "UNEXPLAINED" for cause in causes)
            if "" in causes:
                unexplained.add(order)
        if unexplained:
            result.problems.append(f"{len(unexplained)} done twice:\n{self._story(unexplained, attempts)}")
        result.problems += self._bad_ends()
        return result

    def _was_removed(self, order: str) -> bool:
        """Return whether the server has removed a dead letter, which it was seen to do after a leader was killed."""
        is_dead = any(script.found(f"{order} will be processed via DLQ") for script in self.group.all)
        return is_dead and any(fault.kind == "leader killed" for fault in self.faults)

    def _attempts(self) -> dict[str, list[Attempt]]:
        """Return the attempts at each order, in the order in which they were begun."""
        found: defaultdict[str, list[Attempt]] = defaultdict(list)
        for script in self.group.all:
            is_reprocess = self._role(script) == "reprocess"
            for event in filter(None, map(EVENT.search, script.lines)):
                what, order, when = event[1], event[2], float(event[3])
                if what == "begun":
                    found[order].append(Attempt(script, is_reprocess, when))
                else:
                    attempt = next(one for one in reversed(found[order]) if one.script == script)
                    attempt.ended, attempt.failed = when, what == "failed"
        return {order: sorted(tries, key=lambda one: one.begun) for order, tries in found.items()}

    def _causes(self, tries: list[Attempt]) -> Iterator[str]:
        """Yield the cause, or "", of each attempt that was begun although an earlier one had not failed."""
        for number, later in enumerate(tries):
            earlier = [one for one in tries[:number] if not one.failed_before(later.begun)]
            if earlier:
                causes = [self._cause(one, later, tries) for one in earlier]
                yield min(causes, key=bool)

    def _cause(self, earlier: Attempt, later: Attempt, tries: list[Attempt]) -> str:
        """Return why both of two attempts were begun."""
        for excuse in self._excuses(earlier.script):
            if _overlaps(earlier, excuse):
                return excuse.kind
        for excuse in self._excuses(later.script):  # the order may have been in flight there, and not begun
            if _overlaps(earlier, excuse) and excuse.start <= later.begun <= excuse.end + RECOVERY_TIME:
                return excuse.kind
        for fault in self.faults:  # a dead letter that is in the queue again
            is_dead = any(one.failed_before(fault.end) for one in tries)
            in_time = fault.start <= earlier.begun and later.begun <= fault.end + SEARCH_TIME
            if fault.kind == REDRIVE and is_dead and in_time and earlier.is_reprocess != later.is_reprocess:
                return fault.kind
        return ""

    def _unconfirmed(self, script: Script) -> list[Fault]:
        """Return the end of a shutdown that had to leave some acks unconfirmed."""
        lines = zip(script.times, script.lines, strict=True)
        return [
            Fault("shut down without a server", when - CONFIRM_TIME, (script,), when)
            for when, line in lines
            if line.endswith("their acks are not confirmed")
        ]

    def _excuses(self, script: Script) -> Iterator[Fault]:
        """Yield the faults that hit a process, those that overlap as one, after which orders may be done twice."""
        all_faults = self.faults + self._unconfirmed(script)
        hits = [fault for fault in all_faults if not fault.hit or script in fault.hit]
        hits = sorted((one for one in hits if one.kind in LOSES | INTERRUPTS | LENGTHENS), key=lambda one: one.start)
        together: list[list[Fault]] = []
        for fault in hits:
            if together and fault.start <= max(one.end for one in together[-1]) + RECOVERY_TIME:
                together[-1].append(fault)
            else:
                together.append([fault])
        for faults in together:
            kinds = {fault.kind for fault in faults}
            start, end = faults[0].start, max(fault.end for fault in faults)
            if kinds & LOSES or (kinds & INTERRUPTS and end - start > MAX_INTERRUPTION):
                yield Fault(" + ".join(sorted(kinds)), start, (script,), end)

    def _bad_ends(self) -> Iterator[str]:
        """Yield what is wrong with the end or the log of a process."""
        for script in self.group.all:
            status, last = script.process.returncode, "\n".join(script.lines[-5:])
            is_expected = status == 0 or (status == 1 and EXCUSES.search(last))
            if status in (-9, -15, 128 + 15):  # SIGTERM ends a script at once that has nothing in flight yet
                is_expected = script in self.signalled and (status == -9 or not script.found("shutting down.*"))
            if not is_expected:
                yield f"{self._label(script)} ended with {status}:\n{last}"
            if any(map(BAD.search, script.lines)):
                yield f"{self._label(script)} has a traceback:\n" + "\n".join(script.lines[-100:])

    def _role(self, script: Script) -> str:
        path = Path(self.group.commands[script][0])
        return path.parent.name if path.stem == "consumer" else path.stem

    def _label(self, script: Script) -> str:
        return f"{self._role(script)} {self.group.all.index(script)}"

    def _story(self, orders: Collection[str], attempts: dict[str, list[Attempt]]) -> str:
        """Return the faults, and the lines of the processes that worked on some of the orders, sorted by time."""
        told = sorted(orders)[:5]
        scripts = {one.script for order in told for one in attempts.get(order, ())}
        lines = [
            (when, f"{self._label(script)}: {line[20:]}")
            for script in scripts
            for when, line in zip(script.times, script.lines, strict=True)
            if not (found := re.search(r"order-\d+", line)) or found[0] in told
        ]
        for fault in self.faults:
            hit = ", ".join(self._label(script) for script in fault.hit) or "all"
            lines += [(fault.start, f"*** {fault.kind} of {hit}"), (fault.end, f"*** end of {fault.kind} of {hit}")]
        return f"{', '.join(sorted(orders))}\n" + "\n".join(f"{when:.2f} {line}" for when, line in _shortened(lines))


def _is_done(attempt: Attempt) -> bool:
    return attempt.ended < math.inf and not attempt.failed


def _overlaps(attempt: Attempt, fault: Fault) -> bool:
    return attempt.begun <= fault.end + RECOVERY_TIME and attempt.ended + ACK_TIME >= fault.start


def _shortened(lines: Iterable[tuple[float, str]]) -> Iterator[tuple[float, str]]:
    """Yield the lines sorted by time, and of those that follow each other and are the same only the first."""
    for _, same in groupby(sorted(lines), key=lambda line: line[1]):
        yield next(same)
