"""The assignment of least total cost, by shortest augmenting paths (Jonker, Volgenant, 1987; Crouse, 2016)."""

import numpy as np


def least_cost_assignment(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pair rows with columns one to one so that the sum of their costs is least; all of the shorter side are paired.

    Rows join one by one. A new row looks for the cheapest chain of re-pairings that ends at a free column, where the
    cost of a pair is counted above the two prices that earlier rows have settled on, so it is never negative.

    Args:
        cost: (n, m) finite numbers.

    Returns:
        Rows and columns of the min(n, m) pairs, int64, rows rising.

    Raises:
        ValueError: A cost is not finite.

    Example:
        >>> import numpy as np
        >>> from heads.query.hungarian import least_cost_assignment
        >>> rows, columns = least_cost_assignment(np.array([[1.0, 2.0, 9.0], [1.0, 5.0, 9.0]]))
        >>> rows.tolist(), columns.tolist()
        ([0, 1], [1, 0])
    """
    cost = np.asarray(cost, dtype=np.float64)
    if not np.isfinite(cost).all():
        raise ValueError("a cost is not a finite number")
    if cost.shape[0] > cost.shape[1]:
        columns, rows = least_cost_assignment(cost.T)
        order = rows.argsort()
        return rows[order], columns[order]
    rows, columns = cost.shape
    row_price, column_price = np.zeros(rows), np.zeros(columns)
    row_of = np.full(columns, -1)
    column_of = np.full(rows, -1)
    for start in range(rows):
        # Dijkstra's search: `distance` to every column, `before` it the row from which it was reached.
        distance = np.full(columns, np.inf)
        before = np.full(columns, -1)
        settled = np.zeros(columns, dtype=bool)
        row, reached = start, 0.0
        while True:
            through = reached + cost[row] - row_price[row] - column_price
            closer = ~settled & (through < distance)
            distance[closer], before[closer] = through[closer], row
            column = int(np.where(settled, np.inf, distance).argmin())
            reached = distance[column]
            if row_of[column] < 0:
                break
            settled[column] = True
            row = row_of[column]
        # Prices rise by what the search has shown them to be worth, so that paired costs stay equal to their prices.
        row_price[start] += reached
        row_price[row_of[settled]] += reached - distance[settled]
        column_price[settled] -= reached - distance[settled]
        while column >= 0:
            row = before[column]
            row_of[column] = row
            column, column_of[row] = column_of[row], column
    return np.arange(rows), column_of
