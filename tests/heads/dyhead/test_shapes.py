"""`python -m heads.dyhead.shapes` prints what really flows through a block."""

import torch

from heads.dyhead.dyhead import DyHead
from heads.dyhead.shapes import describe, main, trace


def test_the_order_of_the_attentions_and_their_shapes():
    features = [torch.zeros(1, 16, *size) for size in ((8, 12), (4, 6), (2, 3))]
    rows = trace(DyHead(16, 1, levels=3), features)
    assert [row[0][0] for row in rows[1:-1]] == ["S", "L", "C"]
    sampled = "1×16×8×12 + 1×16×8×12\n1×16×4×6 + 1×16×4×6 + 1×16×4×6\n1×16×2×3 + 1×16×2×3"
    assert rows[1][1:] == (describe(features), sampled)
    assert rows[2][1:] == (sampled, describe(features))

    rows = trace(DyHead(16, 1, formulation="paper", levels=3), features)
    assert [row[0][0] for row in rows[1:-1]] == ["L", "S", "C"]
    assert all(row[1:] == ("1×3×16×4×6", "1×3×16×4×6") for row in rows[1:-1])


def test_the_command_prints_both_formulations(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["heads.dyhead.shapes", "--size", "128", "192", "--channels", "16"])
    main()
    printed = capsys.readouterr().out
    assert "released formulation" in printed and "paper formulation" in printed
    assert "1×16×16×24" in printed and "1×5×16×4×6" in printed
