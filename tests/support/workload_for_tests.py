"""A workload written by hand, so that plans can be checked without importing a model."""

from moec.targets.serving.workload import Curve, Experts, Layer, State, Weights, Workload

HIDDEN, HEADS, GROUPS, WIDTH = 1024, 16, 4, 64
EXPERTS, CHOSEN, INNER, LAYERS, VOCABULARY = 32, 4, 512, 8, 32000


def small_workload():
    """Return a model of eight layers with 32 experts each, bf16, of 453 M parameters."""
    attention = HIDDEN * WIDTH * (2 * HEADS + 2 * GROUPS)
    router, expert = EXPERTS * HIDDEN, 3 * HIDDEN * INNER
    cache = Curve(lambda past: GROUPS * WIDTH * past)
    layer = Layer(
        name="layer",
        calls=LAYERS,
        kernels=8,
        weights=(
            Weights("attention", attention, 2 * attention, 2 * attention),
            Weights("router", router, 2 * router, 2 * router),
        ),
        experts=(Experts(EXPERTS, CHOSEN, expert, INNER, HIDDEN, 2 * EXPERTS * expert, 2 * CHOSEN * expert),),
        states=(State(GROUPS, cache, cache, True), State(GROUPS, cache, cache, True)),
        attention=Curve(lambda past: 4 * HEADS * WIDTH * past),
    )
    table = VOCABULARY * HIDDEN
    ends = Layer(
        "main", 1, 3, (Weights("embedding", table, 2 * table, 0), Weights("head", table, 2 * table, 2 * table)), (), (),
        Curve(lambda past: 0 * past),
    )  # fmt: skip
    return Workload("small", (layer, ends), HIDDEN, HEADS, 65536)
