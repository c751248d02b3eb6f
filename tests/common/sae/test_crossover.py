"""Which way products with codes go: the roofline by hand, and its crossovers."""

from collections.abc import Sequence

import pytest

from saex_pipe.common.sae import compute as compute_module
from saex_pipe.common.sae import counted
from saex_pipe.common.sae.compute import Compute
from saex_pipe.common.sae.crossover import CPU_LATENTS_PER_ACTIVE, Product, Sizes, expected_seconds, gathers_pay, way

MiB = 2**20


def test_seconds_by_hand() -> None:
    # Rows, width, latents, active: 2 GiB of codes, 512 MiB of weights, 64 rows of 8 KiB for each batch row.
    sizes = Sizes(8192, 2048, 65536, 64)
    small = 3 * 8192 * 64 * 4  # ids twice and codes
    bandwidth, peak = 2.46e12, 459e12
    assert expected_seconds("sum", sizes, "v5p") == pytest.approx(
        {
            "gather": (3 * 64 + 2 * 8) * 64 * MiB / bandwidth,
            "dense": 2048 * MiB / bandwidth + 2 * 8192 * 2048 * 65536 / peak,
            "pallas": ((64 + 1) * 64 * MiB + small) / bandwidth,
        }
    )
    assert expected_seconds("dot", sizes, "v5p")["gather"] == pytest.approx(
        ((3 * 64 + 1) * 64 * MiB + small) / bandwidth
    )
    assert expected_seconds("dot", sizes, "v5e")["gather"] == expected_seconds("dot", sizes, "v5e")["pallas"]
    runs = 65536 + 8192 * 64 // 8
    assert expected_seconds("scatter", sizes, "v5p") == pytest.approx(
        {
            "gather": (3 * runs * 9 * 2048 * 4 + 512 * MiB) / bandwidth,
            "dense": 2048 * MiB / bandwidth + 2 * 8192 * 2048 * 65536 / peak,
        }
    )


def test_few_rows_are_bound_by_the_weights() -> None:
    sizes = Sizes(8, 2048, 65536, 64)
    codes, batch = 8 * 65536 * 4, 8 * 2048 * 4
    assert expected_seconds("sum", sizes, "v5e")["dense"] == pytest.approx((2 * codes + 512 * MiB + batch) / 0.82e12)


def chosen(monkeypatch: pytest.MonkeyPatch, kind: str | None, product: str, sizes: Sizes, **compute: str) -> str:
    monkeypatch.setattr(compute_module, "tpu_kind", lambda device: kind)
    return way(product, sizes, Compute(**compute), kernel=compute.get("codes") != "sparse")


@pytest.mark.parametrize(
    ("kind", "product", "latents", "active", "expected"),
    [
        # One latent costs 4 D bytes at HBM's rate, against 2 D operations for each of F at peak and 8 bytes of codes.
        ("v5e", "sum", 2**14, 32, "pallas"),
        ("v5e", "sum", 2**14, 64, "dense"),
        ("v5e", "sum", 2**16, 128, "pallas"),
        ("v5p", "sum", 2**14, 32, "pallas"),
        ("v5p", "sum", 2**14, 64, "dense"),
        ("v5p", "dot", 2**16, 64, "pallas"),
        ("v5e", "dot", 2**16, 64, "gather"),  # as many bytes, without a kernel
        ("v5e", "scatter", 2**16, 32, "dense"),
        ("v5e", "scatter", 2**20, 128, "gather"),  # though slower than dense, whose 16 GiB of codes do not fit
        ("v5e", "sum", 2**20, 128, "pallas"),
    ],
)
def test_crossovers_of_tpus(
    monkeypatch: pytest.MonkeyPatch, kind: str, product: str, latents: int, active: int, expected: str
) -> None:
    assert chosen(monkeypatch, kind, product, Sizes(4096, 2304, latents, active)) == expected


def test_without_a_kernel_and_by_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(4096, 2304, 2**14, 64)
    assert chosen(monkeypatch, "v5e", "sum", sizes, codes="sparse") == "gather"
    assert chosen(monkeypatch, "v5e", "sum", sizes._replace(latents=2**18), codes="dense") == "dense"
    assert chosen(monkeypatch, None, "sum", sizes._replace(latents=2**18), codes="dense") == "dense"
    assert chosen(monkeypatch, None, "sum", sizes._replace(latents=65), codes="sparse") == "gather"


def test_the_crossover_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Sizes(100, 16, 5 * CPU_LATENTS_PER_ACTIVE, 5)
    assert chosen(monkeypatch, None, "sum", few) == "gather"
    assert chosen(monkeypatch, None, "sum", few._replace(active=6)) == "dense"


@pytest.mark.parametrize("kind", ["v5e", "v5p", "v6e"])
def test_on_tpus_few_of_unknown_number_are_gone_by_in_large_dictionaries_only(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(compute_module, "tpu_kind", lambda device: kind)

    def limits(shape: tuple[int, int], products: Sequence[Product] = ("sum",), **compute: str) -> list[int]:
        return counted.limits(shape, 2304, products, Compute(**compute))

    assert limits((4096, 1 << 16)) == [4096 * 4, 4096 * 16]
    # A scatter writes all weights, and a row of them for each active latent several times over.
    assert limits((4096, 1 << 16), ("scatter",)) == ([] if kind == "v6e" else [4096 * 4])
    assert limits((4096, 1 << 16), ("dot", "scatter")) == [4096 * 4]
    assert limits((4096, 1 << 13)) == [4096 * 2]  # 16,384 latents are not there
    assert limits((4096, 1 << 11)) == []
    assert limits((4096, 1 << 16), codes="dense") == []
    assert limits((8, 1 << 16)) == [8 * 4, 8 * 16]
    assert limits((1 << 15, 1 << 16)) == []  # more than an int32 counts


def test_products_that_go_together_are_gone_by_where_they_pay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(4096, 2304, 1 << 16, 4)

    def pays(*products: Product, kind: str | None = "v6e", sizes: Sizes = sizes, codes: str = "auto") -> bool:
        monkeypatch.setattr(compute_module, "tpu_kind", lambda device: kind)
        return gathers_pay(products, sizes, Compute(codes=codes))

    assert pays("sum")
    assert pays("dot", "scatter")
    assert not pays("scatter")  # it loses 1.2 ms where the dot gains 1.7
    assert pays("scatter", codes="sparse")
    assert not pays("sum", codes="dense")
    few = sizes._replace(active=(1 << 16) // CPU_LATENTS_PER_ACTIVE)
    assert pays("scatter", kind=None, sizes=few)
    assert not pays("scatter", kind=None, sizes=few._replace(active=few.active + 1))
