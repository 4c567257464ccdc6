from refusal.io.files import csv_text, read_csv


def test_csv_keeps_the_shortest_exact_floats_and_the_order_of_columns(tmp_path):
    rows = [{"b": 0.1 + 0.2, "a": 7, "c": None, "d": True}, {"b": 1e-7, "a": None, "c": 'x,"y"', "d": "as batched"}]
    text = csv_text(rows)
    assert text == 'b,a,c,d\n0.30000000000000004,7,,True\n1e-07,,"x,""y""",as batched\n' and csv_text([]) == "\n"
    (tmp_path / "a.csv").write_text(text)
    assert [(row["b"], row["a"], row["c"]) for row in read_csv(tmp_path / "a.csv")] == [
        (0.1 + 0.2, 7, None),
        (1e-7, None, 'x,"y"'),
    ]
