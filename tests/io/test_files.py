from refusal.io.files import csv_text, read_csv, rounded


def test_csv_keeps_six_digits_and_the_order_of_columns(tmp_path):
    rows = [{"b": 0.1 + 0.2, "a": 1234567, "c": None, "d": True}, {"b": 1e-7, "a": None, "c": 'x,"y"', "d": "as batched"}]
    text = csv_text(rows)
    assert text == 'b,a,c,d\n0.3,1234567,,True\n1e-07,,"x,""y""",as batched\n' and csv_text([]) == "\n"
    (tmp_path / "a.csv").write_text(text)
    assert [(row["b"], row["a"], row["c"]) for row in read_csv(tmp_path / "a.csv")] == [
        (0.3, 1234567, None),
        (1e-7, None, 'x,"y"'),
    ]


def test_floats_alone_are_rounded_to_six_significant_digits():
    value = {"a": [1 / 3, 2e-9 / 3, 123456789.0], "b": (True, 123456789, None, "0.3333333333"), "c": {"d": -2 / 3}}
    wanted = {"a": [0.333333, 6.66667e-10, 123457000.0], "b": [True, 123456789, None, "0.3333333333"], "c": {"d": -0.666667}}
    assert rounded(value) == wanted
