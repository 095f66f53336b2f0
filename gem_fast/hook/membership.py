"""Which processes train the hook's model: known when the hook is made, or found by its first step."""

from collections.abc import Sequence

import torch.distributed as dist
from torch import nn
from torch.nn import Parameter

from gem_fast.distributed import Ranks, exchanges_gradients, ranks_of, replica, say_alone
from gem_fast.gradients import Engine
from gem_fast.gradients.sharded_engine import ShardedEngine


class Membership:
    """The processes that a model is trained by; a model may be wrapped or sharded after the hook was made.

    Args:
        model: as the user has it.
        parameters: those that the optimizer trains.
        process_group: the ranks that train replicas of the model, where it does not say so itself.
        engine: what computes the rows of this rank's examples.

    Attributes:
        model: the one whose passes start no reduction of gradients.
        ranks: who they are; None for one process alone.
        sharded: what computes G on several processes; None on one.
        is_settled: whether there is nothing more to find.

    Raises:
        ValueError: as for `ranks_of` and `ShardedEngine`.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Parameter],
        process_group: "dist.ProcessGroup | None",
        engine: Engine,
    ) -> None:
        self.model = replica(model)
        self.ranks: Ranks | None = None
        self.sharded: ShardedEngine | None = None
        self._engine = engine
        self.is_settled = self._is_loaded = False
        self._join(ranks_of(model, parameters, process_group))

    def find(self, parameters: Sequence[Parameter], *, is_last: bool = False) -> None:
        """Looks for the processes, where they are not known.

        Args:
            parameters: those that the optimizer trains now.
            is_last: whether this is a step; what is not found by then is not looked for again.

        Raises:
            ValueError: as for the constructor.
            RuntimeError: they are found after a state was loaded by one process alone.
        """
        if self.is_settled or not parameters:
            return
        self._join(ranks_of(self.model, parameters))
        if self.is_settled and self._is_loaded:
            raise RuntimeError(
                "load_state_dict must be called after the model is wrapped in DistributedDataParallel or sharded, got "
                "a state before that: each process would have the examples of all"
            )
        if is_last and not self.is_settled:
            self.is_settled = True
            say_alone()

    def check_exchanges(self, model: nn.Module) -> None:
        """Raises RuntimeError where a backward through the model, as the user gave it, leaves this rank's gradient."""
        ranks = self.ranks
        if ranks is not None and ranks.size > 1 and not ranks.shards and not exchanges_gradients(model):
            raise RuntimeError(
                "step needs the hook's model in DistributedDataParallel on several processes, got the one inside: its "
                "backward exchanges no gradients; give GEM the wrapper, or call backward() and optimizer.step()"
            )

    def loaded(self, *, as_many_ranks: bool) -> None:
        """The hook took up a state.

        Args:
            as_many_ranks: whether the state is one of as many processes as there are.
        """
        self._is_loaded = True
        if self.sharded is not None:
            self.sharded.reset(keep_rows=as_many_ranks)

    def _join(self, ranks: Ranks | None) -> None:
        self.ranks, self.is_settled = ranks, ranks is not None
        if ranks is not None and (ranks.size > 1 or ranks.shards):
            self.sharded = ShardedEngine(self._engine, ranks, self.model)
