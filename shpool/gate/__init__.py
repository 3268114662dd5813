"""The gate: one account, one limit, whatever the number of processes."""

from __future__ import annotations

from shpool.gate.gate import Gate, GateHandle, GateStats
from shpool.gate.limits import PRESETS
from shpool.gate.ticket import AccountGate, Terms, Ticket, unanswered

__all__ = ["PRESETS", "AccountGate", "Gate", "GateHandle", "GateStats", "Terms", "Ticket", "unanswered"]
