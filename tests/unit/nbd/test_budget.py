"""Memory is handed out in the order in which it was asked for."""

from __future__ import annotations

import asyncio

import pytest

from stillpoint.nbd import budget as budget_module
from stillpoint.nbd.budget import Budget


def test_a_large_request_is_not_overtaken_by_small_ones() -> None:
    async def scenario() -> None:
        budget = Budget(100)
        order: list[str] = []
        assert budget.take(60, lambda: None)
        assert not budget.take(100, lambda: order.append("large"))
        assert not budget.take(1, lambda: order.append("small"))
        budget.give_back(60)
        assert order == ["large"]
        budget.give_back(100)
        assert order == ["large", "small"]
        assert budget.free == 99

    asyncio.run(scenario())


def test_who_stops_waiting_makes_way() -> None:
    async def scenario() -> None:
        budget = Budget(100)
        order: list[str] = []

        def large() -> None:
            order.append("large")

        budget.take(50, lambda: None)
        budget.take(80, large)
        budget.take(10, lambda: order.append("small"))
        budget.forget(large)
        assert order == ["small"]
        budget.give_back(60)
        assert budget.free == 100

    asyncio.run(scenario())


def test_holders_are_asked_to_end_only_while_somebody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget_module, "_LOOK_EVERY_S", 0.01)

    class Holder:
        asked = 0

        def end_if_stalled(self) -> None:
            self.asked += 1
            if self.asked == 3:
                budget.give_back(100)

    async def scenario() -> int:
        holder = Holder()
        budget.join(holder)
        budget.take(100, lambda: None)
        await asyncio.sleep(0.05)
        assert holder.asked == 0
        granted = asyncio.Event()
        budget.take(1, granted.set)
        await granted.wait()
        await asyncio.sleep(0.05)
        return holder.asked

    budget = Budget(100)
    assert asyncio.run(scenario()) == 3
