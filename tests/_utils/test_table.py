import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from entropic_fast._utils.table import Table


def test_columns_keep_their_order_and_length():
    table = Table({"b": [1, 2], "a": ["x", "y"]})
    assert table.columns == ("b", "a") and table.num_rows == 2 and list(table) == ["b", "a"]
    assert table.rows() == [{"b": 1, "a": "x"}, {"b": 2, "a": "y"}]


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"equal lengths.*'a': 1.*'b': 2"):
        Table({"a": [1], "b": [1, 2]})


def test_rows_with_other_keys_are_refused():
    with pytest.raises(ValueError, match="row 1"):
        Table.from_rows([{"a": 1}, {"b": 1}])


def test_an_unknown_column_names_those_there_are():
    with pytest.raises(KeyError, match=r"'c'.*\['a'\]"):
        Table({"a": [1]})["c"]


def test_where_keeps_the_rows_that_match_all():
    table = Table({"k": [0, 0, 1], "s": ["a", "b", "a"], "v": [1.0, 2.0, 3.0]})
    assert table.where(k=0, s="a")["v"].tolist() == [1.0]
    assert table.where(k=9).num_rows == 0


def test_groups_have_all_rows_in_the_order_of_their_first():
    table = Table({"k": [1, 0, 1], "s": ["a", "b", "b"], "v": [1.0, 2.0, 3.0]})
    groups = table.group_by("k")
    assert list(groups) == [1, 0] and groups[1].columns == table.columns
    for k, rows in groups.items():
        assert rows.rows() == table.where(k=k).rows()
    assert list(table.group_by("k", "s")) == [(1, "a"), (0, "b"), (1, "b")]
    assert table.where(k=9).group_by("k") == {}


def test_tables_are_concatenated_if_their_columns_agree():
    a, b = Table({"k": [1], "v": [0.5]}), Table({"k": [2, 3], "v": [1.5, 2.5]})
    assert Table.concatenated([a, b]).rows() == [*a.rows(), *b.rows()]
    assert Table.concatenated([]).num_rows == 0
    with pytest.raises(ValueError, match="row 1"):
        Table.concatenated([a, Table({"v": [0.5]})])


@given(st.lists(st.tuples(st.integers(-(2**53), 2**53), st.floats(allow_nan=False)), min_size=1))
def test_a_csv_file_restores_every_number_exactly(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("t") / "t.csv"
    table = Table({"i": [r[0] for r in rows], "x": [r[1] for r in rows]})
    table.to_csv(path)
    again = Table.from_csv(path)
    assert again.columns == ("i", "x")
    assert again["i"].tolist() == table["i"].tolist()
    assert again["x"].astype(float).tolist() == table["x"].tolist()


def test_csv_keeps_nan_infinity_text_and_truth(tmp_path):
    path = tmp_path / "t.csv"
    Table({"x": [math.nan, math.inf], "s": ['a,"b"', "line\nbreak"], "t": [True, False]}).to_csv(
        path
    )
    again = Table.from_csv(path)
    assert math.isnan(again["x"][0]) and again["x"][1] == math.inf
    assert again["s"].tolist() == ['a,"b"', "line\nbreak"]
    assert again["t"].tolist() == [True, False] and again["t"].dtype == bool


def test_an_empty_table_survives_its_file(tmp_path):
    Table({"a": [], "b": []}).to_csv(tmp_path / "t.csv")
    again = Table.from_csv(tmp_path / "t.csv")
    assert again.columns == ("a", "b") and again.num_rows == 0


def test_a_damaged_csv_names_its_line(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,2\n3\n")
    with pytest.raises(ValueError, match=r"t\.csv, line 3: expected 2 values, got 1"):
        Table.from_csv(tmp_path / "t.csv")
    (tmp_path / "t.csv").write_text("")
    with pytest.raises(ValueError, match="empty file"):
        Table.from_csv(tmp_path / "t.csv")


@pytest.mark.parametrize("content", [b"a\n" + b"x" * 200_000 + b"\n", b"a\n\xff\n"])
def test_a_csv_that_does_not_parse_is_named(tmp_path, content):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.csv: expected a CSV table"):
        Table.from_csv(tmp_path / "t.csv")


def test_whole_numbers_beyond_64_bits_are_floats(tmp_path):
    (tmp_path / "t.csv").write_text("a\n1\n" + "9" * 30 + "\n")
    assert Table.from_csv(tmp_path / "t.csv")["a"].dtype == np.float64


def test_html_escapes_its_content():
    assert "&lt;b&gt;" in Table({"<b>": ["<i>"]})._repr_html_()


def test_values_may_be_arrays():
    table = Table({"x": np.arange(3.0)})
    assert table["x"].dtype == np.float64 and "3 rows" in repr(table)
