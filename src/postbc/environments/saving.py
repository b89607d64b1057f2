"""States of foreign environments: of the vector environment as a whole, or of each environment within gymnasium's own two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

from postbc.environments.spaces import plain_state

#: What gymnasium's own TimeLimit, which `gymnasium.make` puts around an environment, has to remember.
ELAPSED = "_elapsed_steps"


class StateSaver:
    """`get_state` and `set_state` of a vector environment, or of all environments within one.

    A vector environment inside one of gymnasium's vector wrappers has none: the wrapper may remember something too.

    Attributes:
        whole: whether it is the vector environment's own, which covers all.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        wrapped = env.unwrapped is not env
        self.whole = not wrapped and all(callable(getattr(env, name, None)) for name in ("get_state", "set_state"))
        inner = isinstance(env, SyncVectorEnv | AsyncVectorEnv) and not self.whole
        self.inner = inner and all(all(self.env.call("has_wrapper_attr", name)) for name in ("get_state", "set_state"))
        self.timed = self.inner and all(self.env.call("has_wrapper_attr", ELAPSED))

    def get(self) -> dict[str, Any] | None:
        """Plain data; None where it cannot be said."""
        env = self.env
        if self.whole:
            return {"whole": plain_state(env.get_state())}
        if not self.inner:
            return None
        states = [plain_state(state) for state in env.call("get_state")]
        return {"each": states, "elapsed": [int(n or 0) for n in env.get_attr(ELAPSED)] if self.timed else None}

    def set(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`get`."""
        env = self.env
        if self.whole:
            env.set_state(state["whole"])
            return
        self._set_each(env, state["each"])
        if self.timed:
            env.set_attr(ELAPSED, list(state["elapsed"]))

    @staticmethod
    def _set_each(env: SyncVectorEnv | AsyncVectorEnv, states: Sequence[Any]) -> None:
        if isinstance(env, SyncVectorEnv):
            for one, state in zip(env.envs, states):
                one.get_wrapper_attr("set_state")(state)
            return
        for pipe, state in zip(env.parent_pipes, states):  # `call` has the same arguments for all
            pipe.send(("_call", ("set_state", (state,), {})))
        env._raise_if_errors([pipe.recv()[1] for pipe in env.parent_pipes])
