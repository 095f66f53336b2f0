"""The state of a hook: its memory, the descriptors, the current task, its engine's rows and what draws subsets."""

from collections.abc import Hashable
from typing import Any

from gem_fast.distributed import Ranks
from gem_fast.gradients import Engine
from gem_fast.hook.descriptors import Descriptors, descriptors_of_state
from gem_fast.hook.distributed_state import load_share, pack, unpack
from gem_fast.memory import Memory
from gem_fast.sampling import Generators
from gem_fast.state import check_keys, check_plain_task


def state_of(
    memory: Memory,
    current: Hashable,
    engine: Engine,
    generators: Generators,
    descriptors: Descriptors,
    ranks: Ranks | None,
) -> dict[str, Any]:
    """What `GEM.state_dict` returns.

    Args:
        memory: the hook's.
        current: the current task.
        engine: what computes G.
        generators: what draws subsets.
        descriptors: of the tasks.
        ranks: the processes that take part; None for one alone.
    """
    check_plain_task("task", current)
    mine = {
        "memory": memory.state_dict(),
        "current": current,
        "engine": engine.state_dict(),
        "generator": generators.state_dict(),
        "descriptors": descriptors.state_dict(memory.tasks),
    }
    return mine if ranks is None else {"ranks": pack(ranks.gather(mine))}


def load(
    state: dict[str, Any],
    memory: Memory,
    engine: Engine,
    generators: Generators,
    descriptors: Descriptors,
    ranks: Ranks | None,
) -> tuple[Hashable, Generators, bool]:
    """Has memory, engine and descriptors take up what `state_of` returned, perhaps on another number of ranks.

    Returns:
        The current task, the generators, and whether there are as many ranks as there were.

    Raises:
        ValueError: as for `GEM.load_state_dict`; all are then as they were.
    """
    states = [state]
    if isinstance(state, dict) and "ranks" in state:
        check_keys("state", state, ("ranks",))
        states = unpack(state["ranks"])
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    for each in states:
        check_keys("state", each, ("memory", "current", "engine", "generator", "descriptors"))
        check_plain_task("current", each["current"])
    restored = [generators.restored(each["generator"]) for each in states]
    in_states = [descriptors_of_state(each["descriptors"]) for each in states]
    of_tasks = descriptors.merged(in_states, "as in the state", anew=True)
    mine = states[rank % len(states)]
    before = engine.state_dict()
    engine.load_state_dict(mine["engine"])
    try:
        if len(states) == size:
            memory.load_state_dict(mine["memory"])
        else:
            load_share(memory, [each["memory"] for each in states], rank, size)
    except ValueError:
        engine.load_state_dict(before)
        raise
    descriptors.take(of_tasks)
    return mine["current"], restored[rank % len(states)], len(states) == size
