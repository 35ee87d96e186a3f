"""A cell that tests change: a baseline of the smallest sizes."""

from ablations.grid import Cell

CELL = Cell(
    data="none",
    data_fingerprint="",
    train_fingerprint="",
    image_size=(8,),
    max_size=8,
    test_size=(8,),
    test_flip=False,
    detector="atss",
    backbone="tiny",
    weights="none",
    channels=16,
    attentions=None,
    depth=None,
    formulation=None,
    coarse_offsets=None,
    placement="trunk",
    steps=100,
    batch_size=2,
    optimizer="sgd",
    lr=0.1,
    backbone_lr=1.0,
    offset_lr=1.0,
    weight_decay=1e-4,
    warmup=10,
    seed=3,
    precision="fp32",
    device_kind="cpu",
    backend="auto",
)
