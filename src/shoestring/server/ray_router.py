"""The rule of `routing` as a request router of Ray Serve. Imports Ray, so it is imported only where Ray runs."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from shoestring.server.routing import Routing, shared


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """Ranks replicas for each request; Ray sends it to the first that takes it."""

    _routing: Routing

    def initialize_state(self, **given: Any) -> None:
        self._routing = shared(given["name"])

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._routing.keep(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._routing.lose(replica_id.unique_id)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        there = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        pending_request.routing_context.should_backoff = True  # none may be there for a while
        sent = pending_request.args[0]
        return [[there[name]] for name in self._routing.choose(sent.key, sent.ask, list(there))]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        sent = pending_request.args[0]
        self._routing.settle(sent.key, sent.ask, replica_id.unique_id)
