"""IC-Cache: past answers of a large model become examples with which a small one answers the next similar request.

How it works
    1. A request's last user turn becomes a vector z of length 1. The examples of its own scope (one key, one system
       message) stand in two levels: k-means into K = round(sqrt(N)) clusters, which minimises K + N/K comparisons; the
       nearest clusters are looked into and the n1 best by cosine are taken. Clusters are made anew after 20% growth.
    2. A proxy says how much example e helps model m with request x: u = cos(x, e) q(e) + w_m . f, clipped to 0..1, with
       f = (1, cos, quality, cost of the producer, length of e, length of x, whether m is cheaper than the producer).
       w_m is a ridge regression, learned online from the scores of answers; it is 0 at first.
    3. By decreasing u, e is kept if u > tau and u - lambda_r max cos(e, kept) - lambda_l tokens(e)/context > 0, within
       k_max examples and a budget of tokens. They stand in the prompt by ascending u, each as a user's and an
       assistant's turn. tau is that of a small grid, tried on a share of the requests, with the best mean of score -
       lambda_l tokens/context.
    4. A linear Thompson sampler for each model: A_m = lam I + sum phi phi', b_m = sum r phi, theta ~ N(A^-1 b,
       v^2 A^-1), score = theta . phi, phi = (1, max u, mean u, number of examples, length, z projected to 16). Only the
       model that answered learns. When the two best are within a margin, feedback is asked for.
    5. Load L is the running mean of tokens under way over capacity. Above L0 a model's score loses
       gamma c_m tanh(kappa (L - L0)): this moves the decision, never what was learned.
    6. An answer of the large model, or a small one's that was judged good, becomes an example: without personal data,
       not empty, without template tokens, not within cosine 0.95 of one that is at least as good.
    7. Each score of an answer teaches the examples that were used: G <- (1-a) G + a (1 - score) c_m. When nobody waits,
       the example with the largest G is asked for again, n times, and the best answer by the judge takes its place,
       if it is better; while G exceeds tokens x price, and within a budget. G fades by 0.9 an hour.
    8. V <- (1-a) V + a [offloaded and good], fading alike. What exceeds the capacity in bytes is left out by a 0/1
       knapsack of V over size: exact up to 200 examples, by density beyond.

Where it bends
    The form of G, the fading, Thompson sampling, features and constants are choices made here; the paper's own are not
    published in what was read. A model's one-hot is a regression of its own. Ageing is by the clock. Judging is by
    feedback or by a checker in code (an exact match where there is one); there is no model as judge, so its liking for
    long answers does not enter, and without a checker there are no replays. Tokens are estimated from bytes. Requests
    with tools, pictures or several answers pass through to the large model. What router, proxy and tau learn is shared
    by all keys: numbers, no text. Not for conversations that live on what was said before: only single requests become
    examples. On one machine, prompts with examples can take the small model longer than the large one takes alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shoestring.core.method import Method, Paper
from shoestring.methods.serving._cache import Asked, Cache, Decision, IcCacheConfig
from shoestring.methods.serving._router import Model

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["METHOD", "Asked", "Cache", "Decision", "IcCacheConfig", "Model", "example", "front"]

METHOD = Method(
    paper=Paper("IC-Cache: Efficient Large Language Model Serving via In-context Caching", "2025-01"),
    provides="IcCacheConfig",
    saves=("compute", "latency", "money", "energy"),
    combines={
        "serving": "yes",
        "decoding": "yes",
        "quantizers": "yes",
        "pruners": "yes",
        "adapters": "yes",
    },
    traits={"plugs": "front"},
)


def example() -> IcCacheConfig:
    return IcCacheConfig(small="http://127.0.0.1:8001", large="http://127.0.0.1:8002")


def front(config: IcCacheConfig, settings: Any) -> Any:
    """The application that stands in front of the servers that `config` names.

    Raises:
        UsageError: servers, encoder, checker or pool file cannot be.
    """
    from shoestring.lab.retrieval import sentence_encoder
    from shoestring.methods.serving._relay import Relay, endpoints

    endpoints(config)  # what is wrong with them is said before the encoder is loaded
    encoder = sentence_encoder(config.encoder, threads=settings.threads or 1)

    def opened(models: Sequence[Model]) -> Cache:
        made_by = f"{config.encoder} {encoder.fingerprint()[:16]}"
        return Cache(config, models, lambda text: encoder.encode([text])[0], made_by)

    return Relay(config, opened)
