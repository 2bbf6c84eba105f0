"""Mining planning n-grams: which are kept, against a slow loop and by hand, and the command for files of any format."""

import json
import random
import re
from collections import Counter

import pytest

from ktae_trl import cli, tiny
from ktae_trl.credit import find_method
from ktae_trl.credit.hicra import find_ngrams, read_ngrams
from ktae_trl.report import records
from ktae_trl.report.mining import Mined, Said, beginnings, listed, main, mine
from tests.report import dump_files
from tests.trainers import make_trainer, replay


def mined(*rollouts: tuple[str, str], min_problems: int = 2, top: int = 100) -> dict[str, tuple[int, int, int]]:
    return {one.ngram: one[1:4] for one in mine([Said(*one) for one in rollouts], min_problems, top)}


# Which n-grams are counted


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("We need to find it", ["we need to", "we need to find", "we need to find it"]),
        ("x = 2. So we get it", ["so we get", "so we get it"]),
        ("First, we need it", ["first we need", "first we need it", "we need it"]),  # also after a comma
        ("2 apples are there", []),
        ("$x$ is the sum", []),
        ("so: **we get it**", ["we get it"]),
        ("1. we get it", ["we get it"]),
        ("- we get it\n> so we go", ["we get it", "so we go"]),
        ("Let x be it. Let a be I", ["let a be", "let a be i"]),  # x is a symbol
        ("Let x² be it", []),
        ("we get", []),
        ("", []),
    ],
)
def test_n_grams_that_begin_a_clause(text, expected):
    found = list(beginnings(text))
    assert sorted(ngram for ngram, _ in found) == sorted(expected)
    for ngram, at in found:
        words = re.sub(r"[^\w']+", " ", text[at:].lower())
        assert words.startswith(ngram)


# Which are kept


def test_problems_rollouts_and_times_by_hand():
    rollouts = [
        ("p", "Let us check it. Let us check 2"),
        ("p", "Let us check it."),
        ("q", "So: let us check 3."),
        ("q", "nothing"),
    ]
    assert mined(*rollouts) == {"let us check": (2, 3, 4)}
    assert mined(*rollouts, min_problems=1) == {"let us check it": (1, 2, 2)}
    assert mined(*rollouts, min_problems=3) == {}


def test_calculations_that_repeat_their_words_are_left_out():
    said = "add the number 1. add the number 2. so we are done"
    assert mined(("p", said), ("q", said)) == {"so we are done": (2, 2, 2)}
    once = "add the number 1"  # 3 + 1 times in 2 + 2 rollouts is often enough
    assert mined(("p", said), ("q", said), ("p", once), ("q", once))["add the number"] == (2, 4, 6)


def test_a_copy_of_the_problem_does_not_count():
    said = "The red house is big. We know it now."
    rollouts = [("Why is it said that the red house is big?", said), ("Why?", said), ("Who?", said)]
    assert mined(*rollouts) == {"the red house is big": (2, 2, 2), "we know it now": (3, 3, 3)}


def test_the_longest_wins_over_its_beginnings():
    find, go = "we need to find it", "we need to go"
    assert mined(("p", find), ("q", find)) == {"we need to find it": (2, 2, 2)}
    most = [("p", find), ("q", find), ("p", go), ("q", go)]
    assert mined(*most) == {"we need to find it": (2, 2, 2), "we need to go": (2, 2, 2)}
    others = [(problem, f"we need to {verb}") for problem, verb in zip("pqr", ("see", "do", "ask"), strict=True)]
    assert mined(*most, *others)["we need to"] == (3, 7, 7)  # either longer one has 2 of these 7
    chain = [(str(i), " ".join(["we", "need", "to", "find", "it"][:size])) for size in (3, 4, 5) for i in range(2)]
    chain += [("0", "we need to find"), ("1", "we need to")]  # of 8, 5 and 2 rollouts: 5 of 8 are most, 2 of 5 are not
    assert mined(*chain) == {"we need to find": (2, 5, 5), "we need to find it": (2, 2, 2)}
    chain += [("2", "we need to find it")] * 2  # of 10, 7 and 4: the one of 7 goes, and 4 of 10 are not most
    assert mined(*chain) == {"we need to": (3, 10, 10), "we need to find it": (3, 4, 4)}


def test_the_order_and_the_number():
    rollouts = [("p", "so we go"), ("q", "so we go"), ("p", "now we go"), ("q", "now we go"), ("p", "and so it is")]
    rollouts += [("q", "and so it is"), ("r", "and so it is")]
    assert list(mined(*rollouts)) == ["and so it is", "now we go", "so we go"]
    assert list(mined(*rollouts, top=1)) == ["and so it is"]


def slow(rollouts: list[tuple[str, str]], min_problems: int) -> dict[str, tuple[int, int, int]]:
    """Sentences of plain words between full stops: every beginning of one, counted one at a time."""
    kept = {}
    beginnings = {
        " ".join(sentence.split()[:size]) for _, said in rollouts for sentence in said.split(".") for size in (3, 4, 5)
    }
    for ngram in beginnings:
        words = ngram.split()
        if len(words) < 3 or any(len(word) == 1 and word not in "ai" for word in words):
            continue
        uses = Counter()
        problems = set()
        for number, (problem, said) in enumerate(rollouts):
            if f" {ngram} " in f" {problem} ":
                continue
            for sentence in said.split("."):
                if sentence.split()[: len(words)] == words:
                    uses[number] += 1
                    problems.add(problem)
        if len(problems) >= min_problems and sum(uses.values()) <= 1.5 * len(uses):
            kept[ngram] = (len(problems), len(uses), sum(uses.values()))
    for size in (4, 3):  # those of 5 words stay
        for ngram in [one for one in kept if len(one.split()) == size]:
            if any(other.startswith(ngram + " ") and kept[other][1] >= 0.5 * kept[ngram][1] for other in kept):
                del kept[ngram]
    return kept


def test_mining_against_the_slow_loop():
    rng, sizes = random.Random(0), []
    for _ in range(60):
        sentences = [" ".join(rng.choices(["we", "go", "a", "x", "so"], k=rng.randint(1, 6))) for _ in range(6)]
        rollouts = [
            (rng.choice(["p", "q", "so we go a", "r"]), ". ".join(rng.choices(sentences, k=rng.randint(0, 4))))
            for _ in range(12)
        ]
        found = mined(*rollouts)
        assert found == slow(rollouts, 2)
        sizes.append(len(found))
    assert sum(sizes) > 60


# The command


@pytest.fixture
def rows(tmp_path):
    """A file of 6 problems with two rollouts each."""
    said = ["We need to find it. 1 + 2 = 3. Hence the answer is 3.", "We need to find it. It is about 4."]
    some = [{"prompt": f"Problem {i}", "completion": one, "correct": i % 2} for i in range(6) for one in said]
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some))
    return path


def refusal(*words) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(["mine-ngrams", *map(str, words)])
    assert "\n" not in ended.value.code
    return ended.value.code


def test_the_list_says_where_it_comes_from_and_is_read_by_the_setting(rows, tmp_path, capsys):
    path = tmp_path / "new" / "mine.txt"
    cli.main(["mine-ngrams", str(rows), "-o", str(path), "--min_problems", "6"])
    head = path.read_text().splitlines()[:4]
    assert head[1] == f"# Mined from 12 rollouts of 6 problems in {rows}"
    assert head[2] == f"# by ktae mine-ngrams {rows} -o {path} --min_problems 6"
    assert "--min_problems 6 --top 100" in head[3]
    assert "hence the answer is  # 6 problems, 6 rollouts" in path.read_text().splitlines()
    assert read_ngrams(str(path)) == {"we need to find it", "hence the answer is", "it is about"}
    out = capsys.readouterr().out
    assert re.search(r"we need to find it +6 +12 +1\.00 +We need to find it\.", out)
    assert "3 n-grams, mined from 12 rollouts of 6 problems" in " ".join(out.split())


def test_every_mined_n_gram_is_found_in_training(rows):
    said = {json.loads(line)["completion"] for line in rows.read_text().splitlines()}
    for one in mine([Said(str(i), text) for i in range(2) for text in said], 2, 100):
        assert any(list(find_ngrams(text, {one.ngram})) for text in said), one


def test_a_list_that_was_perhaps_edited_is_not_overwritten(rows, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("let us first\n")
    assert f"{path} already exists. Choose another file with -o" in refusal(rows, "-o", path)
    assert path.read_text() == "let us first\n"


def test_mistakes_are_one_line(rows, tmp_path):
    path = tmp_path / "mine.txt"
    assert "There is no file nowhere" in refusal("nowhere", "-o", path)
    assert "--min_problems must be at least 1, not 0" in refusal(rows, "-o", path, "--min_problems", 0)
    assert "--top must be at least 1, not -1" in refusal(rows, "-o", path, "--top", -1)
    none = refusal(rows, "-o", path, "--min_problems", 7)
    assert "No n-gram is used in rollouts of at least 7 problems (12 rollouts of 6 problems in" in none
    assert not path.exists()


def test_rows_that_cannot_be_read_are_counted(rows, tmp_path, caplog):
    rows.write_text(rows.read_text() + "{broken\n" + '{"prompt": 3}\n')
    main([str(rows), "-o", str(tmp_path / "mine.txt")])
    assert "Skipped 2 rows that could not be read. The first: " in caplog.text


def test_names_cannot_break_the_list_or_the_terminal(rows, tmp_path, capsys):
    folder = tmp_path / "a\nlet us first\x1b[31m"
    folder.mkdir()
    rows.rename(folder / "x.jsonl")
    main([str(folder), "-o", str(tmp_path / "mine.txt")])
    text = (tmp_path / "mine.txt").read_text()
    assert "\x1b" not in text + capsys.readouterr().out
    assert "let us first" not in read_ngrams(str(tmp_path / "mine.txt"))


def test_a_list_is_written_as_it_is_read(tmp_path):
    ngrams = [Mined("let's check it", 3, 4, 5, "Let's check it: 2"), Mined("let us first", 2, 2, 2, "")]
    (tmp_path / "x").write_text(listed(ngrams, "4 rollouts", "ktae mine-ngrams x", "--top 2"))
    assert read_ngrams(str(tmp_path / "x")) == {"let's check it", "let us first"}


# Formats


def test_records_of_a_run(tmp_path):
    settings = {"record_steps": 1, "max_steps": 1, "max_completion_length": 60, "per_device_train_batch_size": 64}
    make_trainer(tmp_path / "run", rollout_func=replay, **settings).train()
    main([str(tmp_path / "run"), "-o", str(tmp_path / "mine.txt")])
    assert read_ngrams(str(tmp_path / "mine.txt")) == read_ngrams("tiny")


@pytest.mark.parametrize("name", sorted(dump_files.WRITERS))
def test_files_of_other_trainers(name, tmp_path, capsys):
    """ "The answer is" and "It is about" begin the rollouts of both problems."""
    folder = tmp_path / "files"
    folder.mkdir()
    dump_files.write(name, folder)
    words = [str(folder), "-o", str(tmp_path / "mine.txt"), "--min_problems", "2", "--tokenizer", str(tiny.MODEL)]
    main(words)
    assert read_ngrams(str(tmp_path / "mine.txt")) == {"the answer is", "it is about"}
    assert re.search(r"the answer is +2 +[46] ", capsys.readouterr().out)


def test_ids_without_a_text_need_a_tokenizer(tmp_path):
    dump_files.write("prime_rl_tokens", tmp_path / "files")
    said = refusal(tmp_path / "files", "-o", tmp_path / "mine.txt")
    assert "prime-rl token exports have token ids without a text. Name the tokenizer of the model: --tokenizer" in said


def test_turns_of_others_and_untrained_tokens_are_not_mined(tmp_path):
    turns = [("assistant", "Let us ask it."), ("tool", "The tool said so."), ("assistant", "Then we know it.")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [{"prompt": f"P{i}", "completion": messages, "correct": True} for i in range(2)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main([str(tmp_path / "x.jsonl"), "-o", str(tmp_path / "mine.txt"), "--min_problems", "2"])
    assert read_ngrams(str(tmp_path / "mine.txt")) == {"let us ask it", "then we know it"}
    record = {"tokens": ["Let us", " go. ", "The tool", " said so. "], "token_ids": [1, 2, 3, 4]}
    record |= {"trained": [True, True, False, False], "prompt": "p", "completion": "".join(record["tokens"])}
    record |= {"step": 1, "group": 0, "rollout": 0, "rewards": {"r": 1.0}, "correct": True, "advantage": 0.0}
    record |= {"credit": [0.0] * 4, "advantages": [0.0] * 4}
    method = records.method_of(find_method("ktae"), "multiply", {})
    records.write(tmp_path / "run" / records.FOLDER / records.file_name(1), records.Record(method, [record]))
    main([str(tmp_path / "run"), "-o", str(tmp_path / "run.txt"), "--min_problems", "1"])
    assert read_ngrams(str(tmp_path / "run.txt")) == {"let us go"}
