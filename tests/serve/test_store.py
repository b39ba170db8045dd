"""The store in SQLite and in a real PostgreSQL: the same schema, the same rows; and errors of a damaged one."""

import contextlib
import sqlite3
import threading

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from penstock.errors import DataError, UserError
from penstock.serve import store as store_module
from penstock.serve.store import open_store
from penstock.serve.tables import metadata


def end(store, message, content, finish_reason="stop"):
    """Stores how an answer ended. Returns the ids of deleted ones."""
    return store.save_answers([{**message, "content": content, "finish_reason": finish_reason}])


def add_example(store, system="Be brief."):
    """A conversation with one question and two answers; their ids."""
    conversation = store.add_conversation("", system)["id"]
    question = store.add_message(conversation, None, "user", "What is\na penstock?")["id"]
    answers = []
    for i, words in enumerate(("A gate.", "A fish.")):
        source = {"model": "tiny", "model_digest": f"{i}" * 64, "sampling": {"seed": i}}
        message = store.add_message(conversation, question, "assistant", "", **source)
        end(store, message, words)
        answers.append(message["id"])
    return conversation, question, answers


def at_once(call):
    """Calls it with 0 to 7 in as many threads. Returns what it raised."""
    failures, begin = [], threading.Barrier(8)

    def attempt(i):
        begin.wait()
        try:
            call(i)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=attempt, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failures


def test_the_migrations_make_the_tables_that_the_code_means(store):
    with store._engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_opening_again_changes_nothing(store):
    conversation, _, _ = add_example(store)
    with contextlib.closing(open_store(*store.address)) as again:
        assert again.conversation(conversation) == store.conversation(conversation)


def test_a_conversation_is_a_tree(store):
    conversation, question, answers = add_example(store)
    assert store.conversation(conversation)["title"] == "What is a penstock?"
    follow_up = store.add_message(conversation, answers[1], "user", "Really?")["id"]
    edited = store.add_message(conversation, None, "user", "What is a weir?")["id"]
    tree = store.messages(conversation)
    assert [row["id"] for row in tree] == [question, *answers, follow_up, edited]
    assert [row["parent_id"] for row in tree] == [None, question, question, answers[1], None]
    turns = store.turns(follow_up, conversation)
    assert [(turn["role"], turn["content"]) for turn in turns] == [
        ("system", "Be brief."), ("user", "What is\na penstock?"), ("assistant", "A fish."), ("user", "Really?")
    ]  # fmt: skip
    leaves = [[turn["content"] for turn in way[1:]] for way in store.leaves(conversation)]
    question_text = "What is\na penstock?"
    assert leaves == [[question_text, "A gate."], [question_text, "A fish.", "Really?"], ["What is a weir?"]]


def test_what_does_not_belong_there_is_refused(store):
    conversation, question, answers = add_example(store)
    other, theirs, _ = add_example(store)
    for parent, role in ((None, "assistant"), (answers[0], "assistant"), (question, "user")):
        with pytest.raises(ValueError, match="belongs under"):
            store.add_message(conversation, parent, role, "x")
    for call in (
        lambda: store.add_message(conversation, theirs, "assistant", "x"),
        lambda: store.add_message("conv_" + "0" * 24, None, "user", "x"),
        lambda: store.conversation("no id at all \0"),
        lambda: store.turns(question, other),
        lambda: store.vote_thumb("msg_" + "0" * 24, 1),
    ):
        with pytest.raises(LookupError, match="there is no"):
            call()


def test_conversations_come_newest_first_page_by_page(store):
    names = [store.add_conversation(f"number {i}", "")["id"] for i in range(5)]
    store.add_message(names[1], None, "user", "hello")
    expected = [names[1], names[4], names[3], names[2], names[0]]
    rows, has_more = [], True
    while has_more:
        page, has_more = store.list_conversations(2, rows[-1]["id"] if rows else None)
        assert 1 <= len(page) <= 2
        rows += page
    assert [row["id"] for row in rows] == expected


def test_titles_and_system_prompts_change_and_all_goes_with_a_conversation(store):
    conversation, _, answers = add_example(store)
    row = store.message(answers[0], conversation)
    store.vote_thumb(answers[0], 1)
    assert store.change_conversation(conversation, {"title": "mine"})["title"] == "mine"
    assert store.change_conversation(conversation, {"system": ""})["system"] == ""
    assert store.conversation(conversation)["title"] == "mine"
    store.remove_conversation(conversation)
    assert store.votes() == []
    with pytest.raises(LookupError):
        store.messages(conversation)
    with pytest.raises(LookupError):
        store.remove_conversation(conversation)
    assert end(store, row, "too late") == {answers[0]}


def test_a_vote_keeps_the_whole_comparison_and_a_second_one_replaces_it(store):
    conversation, _, (left, right) = add_example(store)
    store.vote_pair((right, left), left)
    (vote,) = store.votes(conversation)
    assert [answer["message_id"] for answer in vote["shown"]] == [right, left]
    assert [answer["digest"] for answer in vote["shown"]] == ["1" * 64, "0" * 64]
    assert [answer["sampling"] for answer in vote["shown"]] == [{"seed": 1}, {"seed": 0}]
    assert vote["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert vote["chosen_id"] == left
    store.vote_pair((left, right), None)
    (vote,) = store.votes(conversation)
    assert vote["chosen_id"] is None
    assert [answer["message_id"] for answer in vote["shown"]] == [left, right]
    for value, kept in ((1, [1]), (-1, [-1]), (0, [])):
        store.vote_thumb(left, value)
        assert [vote["value"] for vote in store.votes() if vote["kind"] == "thumb"] == kept


def test_votes_on_an_answer_that_come_at_once_are_one(store):
    _, _, answers = add_example(store)
    assert not at_once(lambda i: store.vote_thumb(answers[0], 1 if i % 2 else -1))
    assert not at_once(lambda i: store.vote_pair(tuple(answers[:: 1 if i % 2 else -1]), None))
    assert [vote["kind"] for vote in store.votes()] == ["thumb", "pair"]


def test_an_answer_that_is_gone_on_with_twice_at_once_goes_on_once(store):
    conversation, _, (answer, _) = add_example(store)
    assert not at_once(lambda i: store.reopen_answer(answer, conversation, {"seed": i}))
    row = store.message(answer, conversation)
    assert row["finish_reason"] is None
    [part] = row["sampling"]["continued"]
    assert part["at"] == len("A gate.")


def test_only_answers_to_the_same_message_can_be_compared(store):
    _talk, question, answers = add_example(store)
    _, _, unrelated = add_example(store)
    for shown, chosen in (
        ((answers[0], answers[0]), None),
        ((answers[0], unrelated[0]), None),
        ((answers[0], answers[1]), question),
    ):
        with pytest.raises(ValueError, match=r"pair|same message"):
            store.vote_pair(shown, chosen)
    with pytest.raises(ValueError, match="is no answer"):
        store.vote_thumb(question, 1)


def test_one_key_and_sessions_that_end(store):
    store.replace_key("a" * 64)
    store.add_session("b" * 64, 1e12)
    store.add_session("c" * 64, 1.0)
    assert store.key_hashes() == ["a" * 64]
    assert (store.session("b" * 64)["ends_at"], store.session("d" * 64)) == (1e12, None)
    store.add_session("e" * 64, 1e12)
    assert store.session("c" * 64) is None  # it had ended, and is forgotten
    store.replace_key("f" * 64)
    assert store.session("b" * 64) is None


def test_an_answer_that_a_killed_server_left_is_ended(store):
    conversation, question, _ = add_example(store)
    store.add_message(conversation, question, "assistant", "")
    store.end_unfinished()
    assert [row["finish_reason"] for row in store.messages(conversation)] == [None, "stop", "stop", "interrupted"]


def test_a_message_that_is_sent_again_is_there_once_though_it_is_sent_at_once(store):
    conversation = store.add_conversation("", "")["id"]
    name, rows = "msg_" + "a" * 24, []
    assert not at_once(lambda _: rows.append(store.add_message(conversation, None, "user", "Hello", message_id=name)))
    assert [row["id"] for row in rows] == [name] * 8
    assert [row["id"] for row in store.messages(conversation)] == [name]
    other = store.add_conversation("", "")["id"]
    for changes in ((other, None, "user", "Hello"), (conversation, None, "user", "Bye")):
        with pytest.raises(ValueError, match="draw another id"):
            store.add_message(*changes, message_id=name)


def test_texts_of_answers_are_stored_in_one_go_and_deleted_ones_are_named(store):
    conversation, question, (first, second) = add_example(store)
    other, _, (gone, _) = add_example(store)
    rows = [store.message(first, conversation), store.message(second, conversation), store.message(gone, other)]
    store.remove_conversation(other)
    assert store.save_answers([{**row, "content": "more", "finish_reason": None} for row in rows]) == {gone}
    stored = store.messages(conversation)[1:]
    assert [(row["content"], row["finish_reason"]) for row in stored] == [("more", None)] * 2
    assert store.save_answers([]) == set()
    assert store.message(question, conversation)["content"] == "What is\na penstock?"


def test_an_answer_that_goes_on_keeps_how_each_part_was_sampled(store):
    conversation, question, (answer, other) = add_example(store)
    for seed in (5, 6):
        row = store.reopen_answer(answer, conversation, {"seed": seed})
        assert (row["content"], row["finish_reason"]) == ("A gate.", None)
        end(store, row, "A gate.", "length")
    parts = [{"at": 7, "seed": 5}, {"at": 7, "seed": 6}]
    assert store.message(answer, conversation)["sampling"] == {"seed": 0, "continued": parts}
    store.add_message(conversation, other, "user", "Really?")
    for name, says in ((question, "is no answer"), (other, "follows this answer")):
        with pytest.raises(ValueError, match=says):
            store.reopen_answer(name, conversation, {})


def test_what_is_below_a_message(store):
    conversation, question, (first, second) = add_example(store)
    follow_up = store.add_message(conversation, second, "user", "Really?")["id"]
    edited = store.add_message(conversation, None, "user", "What is a weir?")["id"]
    assert store.below(second, conversation) == {second, follow_up}
    assert store.below(question, conversation) == {question, first, second, follow_up}
    assert store.below(None, conversation) >= {question, first, second, follow_up, edited}


def test_many_threads_write_at_once(store):
    conversation = store.add_conversation("", "")["id"]
    failures = []

    def write(number):
        try:
            for i in range(10):
                row = store.add_message(conversation, None, "user", f"{number} {i}")
                store.messages(conversation)
                store.turns(row["id"], conversation)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(store.messages(conversation)) == 80


def test_writers_of_one_process_queue_and_do_not_sleep_for_each_other(tmp_path, monkeypatch):
    """SQLite waits for another writer by sleeping, up to 0.1 s at a time: 32 pages had half the tokens per second."""
    monkeypatch.setattr(store_module, "BUSY_SECONDS", 0)  # who finds it busy fails at once
    with contextlib.closing(open_store(str(tmp_path), None)) as store:
        conversation = store.add_conversation("", "")["id"]
        assert at_once(lambda i: [store.add_message(conversation, None, "user", f"{i}") for _ in range(20)]) == []


# --- a damaged one ----------------------------------------------------------------------------------------------------
def damaged(directory):
    """A database whose pages were overwritten."""
    store = open_store(str(directory), None)
    for _ in range(50):
        add_example(store)
    store.close()
    path = directory / "penstock.db"
    whole = bytearray(path.read_bytes())
    for start in range(8192, len(whole), 4096):
        whole[start : start + 2048] = b"\x5a" * 2048
    path.write_bytes(whole)
    return path


def test_a_damaged_database_is_named_and_left_alone(tmp_path):
    path = damaged(tmp_path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"penstock\.db: the database is damaged .* --move-damaged"):
        open_store(str(tmp_path), None)
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["pages", "no database"])
def test_a_damaged_database_is_moved_aside_on_request(tmp_path, damage, capsys):
    path = damaged(tmp_path)
    if damage == "no database":
        path.write_bytes(b"something else entirely" * 1000)
    before = path.read_bytes()
    open_store(str(tmp_path), None, move_damaged=True).close()
    (aside,) = tmp_path.glob("penstock.db.damaged-*")
    assert aside.read_bytes() == before
    assert str(aside) in capsys.readouterr().out
    assert open_store(str(tmp_path), None).list_conversations(1, None) == ([], False)


@pytest.mark.parametrize("name", ["C#", "what?", "50%25 off"])
def test_a_directory_may_have_any_name(tmp_path, name):
    directory = tmp_path / name
    store = open_store(str(directory), None)
    store.replace_key("a" * 64)
    store.close()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with contextlib.closing(open_store(str(directory), None, create=False)) as store:
        assert store.key_hashes() == ["a" * 64]
    (directory / "penstock.db").write_bytes(b"no database" * 1000)
    with pytest.raises(DataError, match="is damaged"):
        open_store(str(directory), None)


def test_a_newer_penstocks_database_is_refused(tmp_path):
    open_store(str(tmp_path), None).close()
    with contextlib.closing(sqlite3.connect(tmp_path / "penstock.db")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.commit()
    with pytest.raises(UserError, match=r"newer penstock .*; update this one\."):
        open_store(str(tmp_path), None)


def test_somebody_elses_tables_are_refused(tmp_path):
    with contextlib.closing(sqlite3.connect(tmp_path / "penstock.db")) as connection:
        connection.execute("CREATE TABLE keys (a)")
    with pytest.raises(UserError, match=r"cannot be opened|tables are not"):
        open_store(str(tmp_path), None)


@pytest.mark.parametrize(("directory", "url", "says"), [
    ("/proc/nothing", None, "--data-dir /proc/nothing: cannot be made"),
    (None, "mysql://x", "--database mysql: give postgresql://"), (None, "nonsense", "give postgresql://"),
    (None, "postgresql://penstock:secret@127.0.0.1:1/none", "cannot be opened"),
])  # fmt: skip
def test_what_cannot_be_reached_is_named_without_its_password(tmp_path, directory, url, says):
    with pytest.raises(UserError) as raised:
        open_store(directory or str(tmp_path), url)
    assert says in str(raised.value)
    assert "secret" not in str(raised.value)
