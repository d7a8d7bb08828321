use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{
    ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, DictionaryArray,
    FixedSizeBinaryArray, Float32Array, Float64Array, Int8Array, Int64Array, LargeStringArray,
    RecordBatch, StringArray, StringViewArray, Time32SecondArray, TimestampMillisecondArray,
    TimestampSecondArray, UInt64Array,
};

use super::*;

fn batch(columns: Vec<(&str, ArrayRef)>) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable(columns.into_iter().map(|(n, a)| (n, a, true)))
        .unwrap()
}

/// One letter per row: `t`, `f`, or `-` for null.
fn rows(filter: &str, batch: &RecordBatch) -> String {
    let filter = Filter::parse(filter).unwrap_or_else(|e| panic!("{filter}: {e}"));
    let bound = filter
        .bind(batch.schema_ref())
        .unwrap_or_else(|e| panic!("{filter}: {e}"));
    let result = bound
        .evaluate(batch)
        .unwrap_or_else(|e| panic!("{filter}: {e}"));
    result
        .iter()
        .map(|v| v.map_or('-', |v| if v { 't' } else { 'f' }))
        .collect()
}

fn refusal(filter: &str, batch: &RecordBatch) -> FilterError {
    match Filter::parse(filter) {
        Err(error) => error,
        Ok(filter) => filter
            .bind(batch.schema_ref())
            .map(|_| panic!("{filter} is accepted"))
            .unwrap_err(),
    }
}

fn numbers() -> RecordBatch {
    batch(vec![
        (
            "i8",
            Arc::new(Int8Array::from(vec![Some(-128), Some(0), Some(127), None])),
        ),
        (
            "i64",
            Arc::new(Int64Array::from(vec![
                Some(i64::MIN),
                Some(1 << 53),
                Some((1 << 53) + 1),
                None,
            ])),
        ),
        (
            "u64",
            Arc::new(UInt64Array::from(vec![
                Some(0),
                Some(5),
                Some(u64::MAX),
                None,
            ])),
        ),
        (
            "f32",
            Arc::new(Float32Array::from(vec![
                Some(0.1),
                Some(-0.0),
                Some(f32::NAN),
                None,
            ])),
        ),
        (
            "f64",
            Arc::new(Float64Array::from(vec![
                Some(0.0),
                Some(-1.5),
                Some(f64::INFINITY),
                None,
            ])),
        ),
        (
            "dec",
            Arc::new(
                Decimal128Array::from(vec![Some(-150), Some(0), Some(1234), None])
                    .with_precision_and_scale(10, 2)
                    .unwrap(),
            ),
        ),
        (
            "flag",
            Arc::new(BooleanArray::from(vec![
                Some(true),
                Some(false),
                None,
                None,
            ])),
        ),
    ])
}

#[test]
fn numbers_compare_by_value_in_range_and_out_of_it() {
    let batch = numbers();
    for (filter, expected) in [
        ("i8 = 0", "ftf-"),
        ("i8 <> 0", "tft-"),
        ("i8 != 0", "tft-"),
        ("0 < i8", "fft-"),
        ("-128 >= i8", "tff-"),
        ("i8 = 300", "fff-"),
        ("i8 < 300", "ttt-"),
        ("i8 >= 300", "fff-"),
        ("i8 > -300", "ttt-"),
        ("i8 <> 300", "ttt-"),
        ("i8 < 0.5", "ttf-"),
        ("i8 > -0.5", "ftt-"),
        ("i8 = 0.5", "fff-"),
        ("i8 <= 127.5", "ttt-"),
        ("i8 > 127.5", "fff-"),
        ("i8 >= -128.5", "ttt-"),
        ("i8 <= -128.5", "fff-"),
        ("i8 = 1.27e2", "fft-"),
        ("i64 = 9007199254740993", "fft-"),
        ("i64 = -9223372036854775808", "tff-"),
        ("i64 < -9223372036854775808", "fff-"),
        ("u64 = 18446744073709551615", "fft-"),
        ("u64 > -1", "ttt-"),
        ("u64 between 1 and 1e30", "ftt-"),
        ("f32 = 0.1", "tff-"),
        ("f32 = 0", "ftf-"),
        ("f32 >= 0", "ttt-"),
        ("f32 < 0", "fff-"),
        ("f32 > 1e38", "fft-"),
        ("f64 <> 0", "ftt-"),
        ("f64 <= 0", "ttf-"),
        ("f64 in (-1.5, 0)", "ttf-"),
        ("f64 in (-1.5, 0, 1, 2, 3, 4)", "ttf-"),
        ("dec = -1.5", "tff-"),
        ("dec > 12.339", "fft-"),
        ("dec = 12.345", "fff-"),
        ("dec >= 12.34", "fft-"),
        ("dec < 1e60", "ttt-"),
    ] {
        assert_eq!(rows(filter, &batch), expected, "{filter}");
    }
}

#[test]
fn nulls_follow_three_valued_logic() {
    let batch = numbers();
    for (filter, expected) in [
        ("flag", "tf--"),
        ("not flag", "ft--"),
        ("flag = true", "tf--"),
        ("flag is null", "fftt"),
        ("flag is not null", "ttff"),
        ("not (flag is null)", "ttff"),
        ("flag and i8 = 127", "ff--"),
        ("flag or i8 = 127", "tft-"),
        ("flag and i8 > 127", "fff-"),
        ("flag or i8 < 300", "ttt-"),
        ("not flag or i8 is null", "ft-t"),
        ("i8 not in (0, 5)", "tft-"),
        ("i8 not in (0, 5, 6, 7, 8, 300)", "tft-"),
        ("i8 not between -1 and 1", "tft-"),
        ("flag in (true, false, true, false, true)", "tt--"),
        ("i8 = 0 or i8 = 127 and flag or i8 = -128", "tt--"),
        ("(i8 = 0 or i8 = 127) and not (flag)", "ft--"),
        ("(i8) = (127)", "fft-"),
        ("((flag))", "tf--"),
    ] {
        assert_eq!(rows(filter, &batch), expected, "{filter}");
    }
}

#[test]
fn texts_bytes_and_times_compare_with_their_literals() {
    let uuid = [7u8; 16];
    let words = ["", "ab", "b'c"];
    let days = [Some(19_753), Some(19_754), Some(0), None]; // 2024-01-31, the next day, 1970
    let seconds = days.map(|d| d.map(|d| i64::from(d) * 86_400));
    let batch = batch(vec![
        (
            "s",
            Arc::new(StringArray::from(vec![
                Some(words[0]),
                Some(words[1]),
                Some(words[2]),
                None,
            ])),
        ),
        (
            "l",
            Arc::new(LargeStringArray::from(vec![
                Some(words[0]),
                Some(words[1]),
                Some(words[2]),
                None,
            ])),
        ),
        (
            "v",
            Arc::new(StringViewArray::from(vec![
                Some(words[0]),
                Some(words[1]),
                Some(words[2]),
                None,
            ])),
        ),
        ("d", {
            let keys = arrow_array::Int32Array::from(vec![Some(0), Some(1), Some(2), None]);
            Arc::new(DictionaryArray::<Int32Type>::new(
                keys,
                Arc::new(StringArray::from(words.to_vec())),
            ))
        }),
        (
            "b",
            Arc::new(BinaryArray::from(vec![
                Some(b"".as_ref()),
                Some(&[1, 255]),
                Some(&[2]),
                None,
            ])),
        ),
        (
            "u",
            Arc::new(
                FixedSizeBinaryArray::try_from_sparse_iter_with_size(
                    [Some(uuid), Some([0; 16]), Some([9; 16]), None].into_iter(),
                    16,
                )
                .unwrap(),
            ),
        ),
        ("day", Arc::new(Date32Array::from(days.to_vec()))),
        (
            "ts",
            Arc::new(TimestampSecondArray::from(seconds.to_vec()).with_timezone("UTC")),
        ),
        (
            "ms",
            Arc::new(TimestampMillisecondArray::from(
                seconds.map(|s| s.map(|s| s * 1000)).to_vec(),
            )),
        ),
        (
            "clock",
            Arc::new(Time32SecondArray::from(vec![
                Some(0),
                Some(3600),
                Some(86_399),
                None,
            ])),
        ),
    ]);
    for (filter, expected) in [
        ("s = ''", "tff-"),
        ("s >= 'ab'", "ftt-"),
        ("s = 'b''c'", "fft-"),
        ("l in ('ab', 'zz')", "ftf-"),
        ("v < 'b'", "ttf-"),
        ("v in ('ab', 'zz', '1', '2', '3')", "ftf-"),
        ("d = 'ab'", "ftf-"),
        ("d in ('', 'zz', '1', '2', '3')", "tff-"),
        ("d is null", "ffft"),
        ("d <> 'ab' and \"d\" is not null", "tftf"),
        ("b = X'01ff'", "ftf-"),
        ("b > X'01FF'", "fft-"),
        ("u = X'07070707070707070707070707070707'", "tff-"),
        ("u = '07070707-0707-0707-0707-070707070707'", "tff-"),
        ("day = date '2024-01-31'", "tff-"),
        ("day = '2024-01-31'", "tff-"),
        ("day > timestamp '2024-01-31T12:00:00Z'", "ftf-"),
        ("day = timestamp '2024-01-31T12:00:00Z'", "fff-"),
        ("ts = '2024-01-31T00:00:00Z'", "tff-"),
        ("ts = timestamp '2024-01-31 01:00:00+01:00'", "tff-"),
        ("ts >= '2024-01-31T00:00:00.000000001Z'", "ftf-"),
        ("ts < date '2024-01-31'", "fft-"),
        (
            "ts in ('1970-01-01', '2024-01-31', '2024-01-31T00:00:00.5Z')",
            "tft-",
        ),
        ("ms between '2024-01-31' and '2024-02-01T00:00:00Z'", "ttf-"),
        ("ms > '0001-01-01'", "ttt-"),
        ("clock >= '01:00'", "ftt-"),
        ("clock = '23:59:59.5'", "fff-"),
    ] {
        assert_eq!(rows(filter, &batch), expected, "{filter}");
    }
}

#[test]
fn what_filters_do_not_have_is_named() {
    let batch = numbers();
    for (filter, fragment) in [
        ("flag and i8 * 2 > 5 or flag", "i8 * 2 > 5"),
        ("abs(i8) > 5 and flag", "abs(i8) > 5"),
        ("i8 > f64", "i8 > f64"),
        ("1 = 1", "1 = 1"),
        ("i8 in (select 1)", "select 1"),
        ("i8 in (1, f64)", "f64"),
        ("flag\n and\n i8 = null or flag", "null"),
        ("flag is true", "flag is true"),
        ("i8 like 'a%'", "i8 like 'a%'"),
        ("i8 not like 'a%'", "i8 not like 'a%'"),
        ("t.i8 = 1", "t.i8 = 1"),
        ("i8 = 1; drop table x", "i8 = 1; drop table x"),
        ("i8 = 1 i8", "i8 = 1 i8"),
        ("i8 = ?", "?"),
        ("i8 = $1", "$1"),
        ("i8::int = 1", "i8::int = 1"),
        ("i8 = 1 + 1", "i8 = 1 + 1"),
        (
            "case when flag then 1 end = 1",
            "case when flag then 1 end = 1",
        ),
        ("i8 = interval '1 day'", "interval '1 day'"),
        ("i8 = time '10:00'", "time '10:00'"),
        ("true", "true"),
        ("i8 = -'a'", "-'a'"),
        ("i8 = \"5\"", "i8 = \"5\""),
        ("i8 = current_date", "i8 = current_date"),
        ("exists (select 1)", "exists (select 1)"),
        ("(flag) (flag)", "(flag) (flag)"),
        ("and", "and"),
        ("\u{e9}\u{e9} ~ 1", "\u{e9}\u{e9} ~ 1"),
    ] {
        match refusal(filter, &batch) {
            FilterError::Unsupported {
                fragment: found, ..
            } => assert_eq!(found, fragment, "{filter}"),
            other => panic!("{filter}: {other:?}"),
        }
    }
}

#[test]
fn literals_of_another_kind_are_refused_with_the_column_and_its_type() {
    let batch = numbers();
    for filter in [
        "i8 = 'abc'",
        "i8 = '5'",
        "flag = 1",
        "f32 = 1e39",
        "f64 < 1e400",
        "dec = true",
        "i8 = X'00'",
    ] {
        let error = refusal(filter, &batch);
        assert!(
            matches!(error, FilterError::Literal { .. }),
            "{filter}: {error}"
        );
    }
    assert_eq!(
        refusal("i8 = 'abc'", &batch).to_string(),
        "the filter compares column i8 of type Int8 with 'abc': it compares with a number, without quotes"
    );
    assert!(matches!(
        refusal("i8", &batch),
        FilterError::NotBoolean { .. }
    ));
    assert!(matches!(
        refusal("not i8", &batch),
        FilterError::NotBoolean { .. }
    ));
    assert_eq!(
        refusal("flagg", &batch),
        FilterError::UnknownColumn {
            column: "flagg".to_owned(),
            hint: Some("flag".to_owned())
        }
    );
    assert_eq!(
        refusal("temperature > 3", &batch),
        FilterError::UnknownColumn {
            column: "temperature".to_owned(),
            hint: None
        }
    );
}

#[test]
fn texts_that_are_no_expression_are_syntax_errors() {
    assert_eq!(Filter::parse("  \n"), Err(FilterError::Empty));
    for filter in [
        "a =",
        "= 1",
        "(a = 1",
        "a = 1)",
        "a = 'x",
        "a and",
        "not",
        "a in ()",
        "a between 1",
        "b = X'1'",
        "b = X'zz'",
    ] {
        let result = Filter::parse(filter);
        assert!(
            matches!(
                result,
                Err(FilterError::Syntax { .. } | FilterError::Unsupported { .. })
            ),
            "{filter}: {result:?}"
        );
    }
    assert!(matches!(
        Filter::parse("a = timestamp 'yesterday'"),
        Err(FilterError::Syntax { .. })
    ));
}

#[test]
fn hostile_texts_end_in_an_error_soon_and_without_overflow() {
    let began = std::time::Instant::now();
    let long = |piece: &str, last: &str| {
        format!(
            "{}{last}",
            piece.repeat((MAX_FILTER_BYTES - last.len()) / piece.len())
        )
    };
    for filter in [
        long("(", "a"),
        long("not ", "a"),
        long("a and ", "a"),
        long("a=", "a"),
        long("-", "1"),
        long("- ", "1"),
        long("a+", "1"),
        long("a and (", "a"),
        long("a in (", "1"),
        long("a in ((", "1"),
        long("a.", "a"),
        long("array<", "a"),
        long("a between 1 and ", "1"),
        long("a is null ", "a"),
        long("timestamp ", "'x'"),
        "a = '".to_owned() + &"x".repeat(MAX_FILTER_BYTES),
        format!("{}a{}", "(".repeat(65), ")".repeat(65)),
        "a or ".repeat(MAX_FILTER_CONDITIONS) + "a",
        long("/*", "a"),
        long("\n", "a ~ 1"),
        "not (a and ".repeat(70) + "a" + &")".repeat(70),
    ] {
        assert!(Filter::parse(&filter).is_err(), "{}", &filter[..40]);
    }
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
}

#[test]
fn filters_at_the_limits_are_answered() {
    let batch = numbers();
    let deep = format!(
        "{}i8 = 0{}",
        "(".repeat(MAX_FILTER_DEPTH),
        ")".repeat(MAX_FILTER_DEPTH)
    );
    assert_eq!(rows(&deep, &batch), "ftf-");
    let mixed = format!(
        "{}i8 = 0{}",
        "i8 = 5 or (".repeat(MAX_FILTER_DEPTH),
        ")".repeat(MAX_FILTER_DEPTH)
    );
    assert_eq!(rows(&mixed, &batch), "ftf-");
    let chain = "i8 = 5 or ".repeat(MAX_FILTER_CONDITIONS - 1) + "i8 = 0";
    assert_eq!(rows(&chain, &batch), "ftf-");
    let list: Vec<String> = (0..9000).map(|n| n.to_string()).collect();
    assert_eq!(
        rows(&format!("u64 in ({})", list.join(",")), &batch),
        "ttf-"
    );
}

#[test]
fn a_filter_lists_its_columns_once_in_order_of_appearance() {
    let filter = Filter::parse(" b > 1 and (a is null or b = 2) and \"Select\" in ('x') ").unwrap();
    assert_eq!(filter.columns(), ["b", "a", "Select"]);
    assert_eq!(
        filter.to_string(),
        "b > 1 and (a is null or b = 2) and \"Select\" in ('x')"
    );
}

#[test]
fn a_batch_of_another_schema_is_an_error_not_a_wrong_answer() {
    let bound = Filter::parse("i8 = 0")
        .unwrap()
        .bind(numbers().schema_ref())
        .unwrap();
    let other = batch(vec![("i8", Arc::new(Int64Array::from(vec![0])))]);
    assert!(bound.evaluate(&other).is_err());
    let empty = RecordBatch::new_empty(numbers().schema());
    assert_eq!(bound.evaluate(&empty).unwrap().len(), 0);
}

#[test]
fn a_slice_of_a_batch_answers_as_the_rows_it_shows() {
    let whole = numbers();
    for filter in [
        "i8 in (0, 127, 5, 6, 7, 8)",
        "i8 > 0",
        "flag or i8 = 127",
        "f64 in (0, 1, 2, 3, 4, 5)",
    ] {
        let answer = rows(filter, &whole);
        assert_eq!(rows(filter, &whole.slice(1, 2)), answer[1..3], "{filter}");
    }
}

#[test]
fn a_literal_of_many_signs_takes_no_longer_than_other_text() {
    let started = std::time::Instant::now();
    let signs = "- ".repeat(16_000) + &"+".repeat(33_001);
    assert_eq!(rows(&format!("i8 = {signs}127"), &numbers()), "fft-");
    // Milliseconds; with a look back at each sign it was a second and more.
    assert!(started.elapsed() < std::time::Duration::from_millis(500));
}
