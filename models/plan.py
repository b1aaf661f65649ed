"""Plans for a maze: a text of moves, a simulator, and a goal near where they end."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from itertools import product
from typing import Any

from llmppl.models.primitives import Maker, kept_number
from llmppl.text.declared import declared
from llmppl.text.grammar import Grammar

MOVES = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
START, WALL = "S", "#"

BY_CHANCE = ((0.0, -1.0), (-1.0, 0.0))
"""What the numbers of :func:`arriving` count to start with: the chance where plans go on, the place where they end."""


@declared
def walk(maze: str, plan: str) -> int:
    """The cell where a plan ends: ``walk("S..\\n.#.", "right right down")`` is 5.

    Cells are numbered along the rows, from 0. A move into a wall or out of the maze stays where it is; words that are
    no moves do not count.

    :param maze: rows of ``.`` (free), ``#`` (wall) and one ``S`` (the start), of one length, on lines of their own.
    :raises ValueError: another maze.
    """
    rows = _rows(maze)
    place = _start(rows)
    for word in re.findall(r"[a-z]+", plan.lower()):
        if word in MOVES:
            place = _moved(rows, place, word)
    return place[0] * len(rows[0]) + place[1]


@declared
def shortest_plans(maze: str, goal: int, most: int = 1000) -> list[str]:
    """All plans with the fewest moves that end in a cell, by breadth-first search; none where it cannot be reached.

    :param most: so many of them, at most.
    """
    rows = _rows(maze)
    width = len(rows[0])
    target, start = divmod(goal, width), _start(rows)
    found: list[str] = []
    waiting: deque[tuple[tuple[int, int], tuple[str, ...]]] = deque([(start, ())])
    seen, best = {start: 0}, None
    while waiting and len(found) < most:
        place, moves = waiting.popleft()
        if best is not None and len(moves) > best:
            break
        if place == target:
            best = len(moves)
            found.append(" ".join(moves))
            continue
        for word in MOVES:
            there = _moved(rows, place, word)
            if there != place and seen.get(there, len(moves) + 1) >= len(moves) + 1:
                seen[there] = len(moves) + 1
                waiting.append((there, (*moves, word)))
    return found


@declared
def plan(
    lm: Maker,
    size: tuple[int, int],
    max_moves: int = 8,
    max_tokens: int | None = None,
    nearness: float = 3.0,
    prompt: str = "The moves of the robot through the maze are:",
) -> Callable[[Any, Any], Any]:
    r"""The program that writes moves and reaches a goal:

    .. math:: z \sim \text{lm}(\text{prompt})\text{, moves only}, \quad e = \text{walk}(\text{maze}, z), \quad
              p(\text{goal} = g) \propto \exp(-\text{nearness} \cdot |g - e|_1)

    The goal is near where the plan ends, so that it can be simulated: whatever a plan reaches is the goal of a
    successful plan, from which a guide learns (hindsight; Andrychowicz et al. 2017). Sites: latent ``plan``;
    deterministic ``end``; observed ``goal``.

    The maze is a string (:func:`walk`), or a list of strings inside a plate; the goal a cell's number, or several.

    :param lm: a :class:`llmppl.LM`, or a :class:`llmppl.numpyro.LM`: the program is then one of NumPyro's.
    :param size: rows and columns of the mazes.
    :param max_moves: of a plan.
    :param max_tokens: of a plan; by default two for each move, and the end.
    :param nearness: nats that each step between end and goal costs.
    :param prompt: stands before the plan.
    :raises ValueError: ``max_moves`` below 1, ``nearness`` not positive.
    """
    if max_moves < 1 or not nearness > 0:
        raise ValueError(f"max_moves={max_moves} must be at least 1, and nearness={nearness} positive.")
    law = {
        "grammar": Grammar.regex(rf"( (up|down|left|right)){{1,{max_moves}}}"),
        "max_tokens": max_tokens or 2 * max_moves + 1,
    }
    cells = [str(cell) for cell in range(size[0] * size[1])]
    sample, distributions = lm.primitives.sample, lm.primitives.distributions

    def score(end: float, cell: str) -> float:
        return -nearness * _distance(divmod(int(end), size[1]), divmod(int(cell), size[1]))

    def reached(maze: str, moves: str) -> float:
        if [len(row) for row in _rows(maze)] != [size[1]] * size[0]:
            raise ValueError(f"the maze has another size than size={size}:\n{maze}")
        return float(walk(maze, moves))  # an integer array is a text

    def solve(maze: Any, goal: Any = None) -> Any:
        moves = sample("plan", lm(prompt, **law))
        end = kept_number(lm, "end", lm.map(reached, maze, moves, returns=float))
        logits = lm.map(score, end[..., None], cells, returns=float)
        sample("goal", distributions.Categorical(logits=logits), obs=goal)
        return moves

    return solve


def goal_told(
    lm: Maker, columns: int, prompt: str = "The moves of the robot through the maze are:"
) -> Callable[..., Any]:
    """What a guide is told, as ``prompt={"plan": goal_told(lm, 5)}``: how far the goal is, and where walls stand beside
    the shortest lines to it, in words; then the program's own prompt."""

    def words(maze: str, goal: float) -> str:
        rows = _rows(maze)
        row, column = _start(rows)
        down, right = int(goal) // columns - row, int(goal) % columns - column
        far = [
            f"{abs(count)} {word}"
            for count, word in ((down, "down" if down > 0 else "up"), (right, "right" if right > 0 else "left"))
            if count
        ]
        closed = [word for word in MOVES if _moved(rows, (row, column), word) == (row, column)]
        wall = f" There is a wall {', '.join(closed)}." if closed else ""
        return f"The goal is {' and '.join(far) or 'here'}.{wall} "

    return lambda maze, goal: [lm.map(words, maze, goal + 0.0), prompt]  # an integer tensor would be a text


def maze_and_goal(lm: Maker) -> Callable[..., Any]:
    """What :func:`toward_goal` is told, as ``told={"plan": maze_and_goal(lm)}`` of a
    :class:`~llmppl.guides.SteeredGuide`: the maze, and the goal's number on a line of its own."""
    return lambda maze, goal: [lm.map("{}\n{:.0f}".format, maze, goal + 0.0)]


def toward_goal(told: str, moves: str) -> list[float]:
    """Where moves have led, seen from the goal, as ``features={"plan": toward_goal}`` of a
    :class:`~llmppl.guides.SteeredGuide`.

    Six numbers: how far the goal is (without walls, in fours); whether it is reached; whether the last move went
    nowhere, or where the robot has been before; whether no move leads nearer, and how many do (in twos). Nothing is
    searched: the way round a wall is not among them.
    """
    if not told:
        return [0.0] * 6
    maze, goal = told.rsplit("\n", 1)
    rows = _rows(maze)
    target = divmod(int(goal), len(rows[0]))
    seen = _places(rows, moves)
    place = seen[-1]
    far = _distance(place, target)
    nearer = sum(_distance(_moved(rows, place, word), target) < far for word in MOVES)
    idle, again = len(seen) > 1 and seen[-2] == place, place in seen[:-2]
    return [far / 4, float(far == 0), float(idle), float(again), float(nearer == 0 and far > 0), nearer / 2]


def arriving(size: tuple[int, int], max_moves: int = 8, nearness: float = 3.0, ending: float = 0.05) -> Any:
    """How far moves are from an end at the goal, for somebody who has the map, as ``features={"plan": arriving(size)}``
    of a :class:`~llmppl.guides.SteeredGuide`.

    Two numbers, nats: what the goal costs if the plan ends here, and −log of the chance of the goal if it goes on at
    random, by dynamic programming over cells and moves that are left. A language model does not move at random; what
    it prefers its own law says. So a guide may start from ``start={"plan": BY_CHANCE}``.

    :param size, max_moves, nearness: as of :func:`plan`.
    :param ending: how likely a plan is to end after a move.
    """

    @lru_cache(1000)
    def chances(maze: str, goal: int) -> list[dict[tuple[int, int], float]]:
        """The chance of the goal from each cell, by how many moves are left."""
        rows, target = _rows(maze), divmod(goal, size[1])
        cells = list(product(range(size[0]), range(size[1])))
        here = {cell: math.exp(-nearness * _distance(cell, target)) for cell in cells}
        found = [here]
        for _ in range(max_moves):
            on = {cell: sum(found[-1][_moved(rows, cell, word)] for word in MOVES) / len(MOVES) for cell in cells}
            found.append({cell: ending * here[cell] + (1 - ending) * on[cell] for cell in cells})
        return found

    def features(told: str, moves: str) -> list[float]:
        if not told:
            return [0.0, 0.0]
        maze, goal = told.rsplit("\n", 1)
        seen = _places(_rows(maze), moves)
        left = max(max_moves - len(seen) + 1, 0)
        ends = nearness * _distance(seen[-1], divmod(int(goal), size[1]))
        return [ends, -math.log(chances(maze, int(goal))[left][seen[-1]])]

    return features


def _distance(one: tuple[int, int], other: tuple[int, int]) -> int:
    return abs(one[0] - other[0]) + abs(one[1] - other[1])


def _places(rows: list[str], moves: str) -> list[tuple[int, int]]:
    """Where a robot has been. A last word that is half written counts: its first letter says which it is."""
    place = _start(rows)
    seen = [place]
    *words, last = re.findall(r"[a-z]+", moves.lower()) or [""]
    for word in [*words, next((word for word in MOVES if last and word.startswith(last)), last)]:
        if word in MOVES:
            place = _moved(rows, place, word)
            seen.append(place)
    return seen


def _rows(maze: str) -> list[str]:
    rows = maze.strip().splitlines()
    if maze.count(START) != 1 or len({len(row) for row in rows}) != 1 or set(maze) - set(".#S\n"):
        raise ValueError(f"a maze has rows of one length of '.', '#' and one 'S', and this one is {maze!r}.")
    return rows


def _start(rows: list[str]) -> tuple[int, int]:
    return next((n, row.index(START)) for n, row in enumerate(rows) if START in row)


def _moved(rows: list[str], place: tuple[int, int], word: str) -> tuple[int, int]:
    row, column = place[0] + MOVES[word][0], place[1] + MOVES[word][1]
    inside = 0 <= row < len(rows) and 0 <= column < len(rows[0])
    return (row, column) if inside and rows[row][column] != WALL else place
