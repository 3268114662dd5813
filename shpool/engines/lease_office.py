"""The driver's side of leases: a thread that answers the workers' questions out of the pool's gate (see ``leases``)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import queue
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shpool.engines.leases import LEASE, WITHIN, Ask, Grant
from shpool.gate import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from shpool.gate import Gate, Terms

logger = logging.getLogger(__name__)

_LOOK = 0.1  # s between two looks whether another pool with this gate has been refused, or waits for a slot
_STALE = 2.5  # s; who has not repeated that it waits for a slot does so no more
_FORGOTTEN = 60.0  # s; not every cluster tells that a worker is gone


@dataclass(eq=False)
class _Tenant:
    """A worker process that leases.

    Attributes:
        echo: Its clock in its last question.
        wants: Slots it waits for.
        asked: When it last said so.
        is_told: It knows that others wait for slots.
    """

    echo: float | None = None
    wants: int = 0
    asked: float = 0.0
    is_told: bool = False


@dataclass(eq=False)
class _Slot:
    """A connection slot of the gate's that is leased."""

    tenant: str
    ticket: Ticket
    until: float


class LeaseOffice:
    """Answer workers out of a gate. What it is told comes from any thread, and none of it waits.

    Args:
        gate: The gate.
        post: Sends a grant to one worker process, or to all with None; must not wait.
        clock: The gate's.
    """

    def __init__(
        self, gate: Gate, post: Callable[[str | None, bytes], object], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._gate = gate
        self._post = post
        self._clock = clock
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # None ends it
        self._thread = threading.Thread(target=self._run, name="shpool-leases", daemon=True)

        # What follows is the thread's alone.
        self._epoch, _, _, _, self._connections = gate.terms()
        self._serials, self._leases = itertools.count(1), itertools.count(1)
        self._tenants: dict[str, _Tenant] = {}  # in the order in which they get slots
        self._slots: dict[int, _Slot] = {}
        self._next: Ticket | None = None  # waits for a slot for whoever is first
        self._looked = 0.0
        self._trouble = ""  # of the last round

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def asked(self, tenant: str, note: bytes) -> None:
        """Answer an ``Ask``, sooner or later."""
        self._inbox.put(functools.partial(self._answer, tenant, note))

    def joined(self, tenant: str) -> None:
        """Tell a worker process that is new how the gate stands."""
        self._inbox.put(functools.partial(self._send, tenant))

    def left(self, tenant: str) -> None:
        """Free what a worker process that is gone has leased."""
        self._inbox.put(functools.partial(self._forget, tenant))

    def close(self) -> None:
        """Take back all slots; harmless when repeated, or when never started."""
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    # In the thread

    def _run(self) -> None:
        nap = 0.0
        while self._heed(nap):
            nap = self._go_on()
        for slot in self._slots.values():
            slot.ticket.release()
        if self._next is not None:
            self._next.release()

    def _heed(self, nap: float) -> bool:
        """Wait for something that was told; then do all there is. Tell whether to go on."""
        with contextlib.suppress(queue.Empty):
            told = self._inbox.get(timeout=nap)
            while told is not None:
                try:
                    told()
                except Exception:  # border: as above, for what a worker sends
                    logger.exception("a worker's question to the gate is not understood")
                told = self._inbox.get_nowait()
            return False
        return True

    def _go_on(self) -> float:
        """Go round, whatever comes of it; without this thread nobody would have leave to send anything."""
        try:
            nap, trouble = self._go_round(), ""
        except Exception as exc:  # border: the gate lies in shared memory, which others can take away
            nap, trouble = _LOOK, f"{type(exc).__name__}: {exc}"
            if trouble != self._trouble:  # else the log would fill with it
                logger.exception("the gate cannot be looked after")
        self._trouble = trouble
        return nap

    def _go_round(self) -> float:
        """Do what nobody asks for; return the seconds until it is to be done again."""
        now = self._clock()
        if now - self._looked >= _LOOK:
            self._looked = now
            self._spread_news()
            self._take_back_expired(now)
            if self._slots and self._gate.has_queue():
                self._recall()
        return min(_LOOK, self._lease_slots(now))

    def _spread_news(self) -> None:
        """Tell all workers when the gate's epoch has changed, whoever has changed it."""
        terms = self._gate.terms()
        if terms.epoch != self._epoch:
            self._epoch = terms.epoch
            self._send(None)

    # Questions

    def _answer(self, name: str, note: bytes) -> None:
        ask, now = Ask.from_bytes(note), self._clock()
        tenant = self._tenants.setdefault(name, _Tenant())
        tenant.echo, tenant.wants, tenant.asked = ask.clock, ask.slots, now
        self._settle(ask)
        for lease in ask.returned:
            self._free(lease, name)
        for lease in ask.held:
            slot = self._slots.get(lease)
            if slot is not None and slot.tenant == name:
                slot.until = now + LEASE
        if ask.pause is not None:
            self._pause(*ask.pause)
        if ask.is_question:
            blocks = [(cost, *self._gate.reserve(count, cost, WITHIN, ask.lead)) for cost, count in ask.moments]
            terms = self._gate.terms()
            good = tuple((cost, tuple(moments)) for cost, epoch, moments in blocks if epoch == terms.epoch)
            self._send(name, good, terms=terms)
        self._lease_slots(now)

    def _settle(self, ask: Ask) -> None:
        """Count what a worker's requests have cost and waited."""
        for epoch, units in ask.spent:
            ticket = Ticket(self._gate, max(0.0, -units))
            ticket.moment, ticket.epoch = self._clock(), epoch
            self._gate.settle(ticket, max(0.0, units))
        if ask.waits or ask.waited:
            self._gate.count_waits(ask.waits, ask.waited)

    def _pause(self, seconds: float, epoch: int, learn: bool) -> None:  # noqa: FBT001 - a tuple's fields
        """Heed a refusal that a worker has met, and tell all."""
        ticket = Ticket(self._gate, 0.0)
        ticket.epoch = epoch
        self._gate.pause(seconds, ticket, learn=learn)
        self._spread_news()

    def _send(
        self,
        name: str | None,
        moments: tuple[tuple[float, tuple[float, ...]], ...] = (),
        slots: tuple[int, ...] = (),
        terms: Terms | None = None,
    ) -> None:
        tenant = None if name is None else self._tenants.get(name)
        is_wanted = self._is_contended(name)
        if tenant is not None:
            tenant.is_told = is_wanted
        terms = terms or self._gate.terms()
        echo = None if tenant is None else tenant.echo
        held = tuple(lease for lease, slot in self._slots.items() if slot.tenant == name)
        grant = Grant(next(self._serials), self._clock(), echo, terms, moments, slots, held, is_wanted)
        try:
            self._post(name, grant.to_bytes())
        except Exception:  # border: the cluster's own code; a worker that hears nothing asks again
            logger.exception("a grant of the gate cannot be sent to %s", name or "the workers")

    # Slots

    def _is_contended(self, name: str | None) -> bool:
        """Tell whether anybody but this worker waits for a slot."""
        others = any(tenant.wants for other, tenant in self._tenants.items() if other != name)
        return others or (self._next is None and bool(self._slots) and self._gate.has_queue())

    def _lease_slots(self, now: float) -> float:
        """Give free slots to those who wait, in turn, one each; return the seconds until another look."""
        granted: dict[str, list[int]] = {}
        wait = _LOOK  # which is often enough where all slots are leased from here: what comes back is told
        while (name := self._first_waiting(now)) is not None:
            ticket = self._next = self._next or Ticket(self._gate, 0.0)
            wait = self._gate.occupy(ticket)
            if ticket.slot < 0:
                self._recall()
                wait = _LOOK if len(self._slots) >= self._connections else wait
                break
            self._next = None
            lease = next(self._leases)
            self._slots[lease] = _Slot(name, ticket, now + LEASE)
            granted.setdefault(name, []).append(lease)
            tenant = self._tenants.pop(name)
            tenant.wants -= 1
            self._tenants[name] = tenant  # the last in turn
        else:
            if self._next is not None:  # who waited does so no more
                self._next.release()
                self._next = None
        for name, leases in granted.items():
            self._send(name, slots=tuple(leases))
        return wait

    def _first_waiting(self, now: float) -> str | None:
        waiting = (name for name, tenant in self._tenants.items() if tenant.wants and tenant.asked > now - _STALE)
        return next(waiting, None)

    def _recall(self) -> None:
        """Tell those who hold slots, once, that others wait."""
        for name in {slot.tenant for slot in self._slots.values()}:
            tenant = self._tenants.get(name)
            if tenant is not None and not tenant.is_told and self._is_contended(name):
                self._send(name)

    def _take_back_expired(self, now: float) -> None:
        for lease, slot in list(self._slots.items()):
            if slot.until <= now:
                logger.warning("worker %s has not renewed its lease of a connection slot", slot.tenant)
                self._free(lease, slot.tenant)
        for name, tenant in list(self._tenants.items()):
            if tenant.asked < now - _STALE:
                tenant.wants = 0
            if tenant.asked < now - _FORGOTTEN:
                del self._tenants[name]

    def _free(self, lease: int, name: str) -> None:
        slot = self._slots.get(lease)
        if slot is not None and slot.tenant == name:
            del self._slots[lease]
            slot.ticket.release()

    def _forget(self, name: str) -> None:
        """Free all that a worker had."""
        self._tenants.pop(name, None)
        for lease, slot in list(self._slots.items()):
            if slot.tenant == name:
                self._free(lease, name)
