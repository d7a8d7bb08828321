use super::*;

fn stream(batches: &[RecordBatch], compression: Option<CompressionType>) -> Vec<u8> {
    let options = IpcWriteOptions::default()
        .try_with_compression(compression)
        .expect("options");
    let schema = batches[0].schema();
    let mut writer =
        StreamWriter::try_new_with_options(Vec::new(), &schema, options).expect("writer");
    for batch in batches {
        writer.write(batch).expect("batch");
    }
    writer.into_inner().expect("stream")
}

fn rows(values: std::ops::Range<i64>) -> RecordBatch {
    let id: ArrayRef = Arc::new(StringArray::from_iter_values(
        values.clone().map(|v| format!("k{v}")),
    ));
    let ts: ArrayRef = Arc::new(
        TimestampMicrosecondArray::from_iter_values(values.clone().map(|v| v * 1_000))
            .with_timezone("UTC"),
    );
    let v: ArrayRef = Arc::new(Int64Array::from_iter_values(values));
    RecordBatch::try_from_iter([("v", v), ("id", id), ("ts", ts)]).expect("batch")
}

#[test]
fn a_record_holds_many_rows_and_what_stands_beside_is_repeated() {
    let features = "[features]\nv = \"int32\"\nat = \"int64\"\n";
    let mut decoder = decoder_of(
        features,
        "format = \"arrow\"\nfields = { at = \"$offset\" }",
    );
    let sent = [
        stream(&[rows(0..3), rows(3..4)], None),
        stream(&[rows(0..0)], None),
        stream(&[rows(4..5)], Some(CompressionType::ZSTD)),
        stream(&[rows(5..7)], Some(CompressionType::LZ4_FRAME)),
    ];
    let decoded = decode(&mut decoder, &values(&sent));
    assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
    assert_eq!(
        shape(&decoded),
        [(RunKind::Upsert, vec![0, 0, 0, 0, 2, 3, 3])]
    );
    assert_eq!(ints(&decoded, "v"), (0..7).map(Some).collect::<Vec<_>>());
    assert_eq!(ints(&decoded, "ts"), (0..7).map(Some).collect::<Vec<_>>());
    assert_eq!(
        ints(&decoded, "at"),
        [0, 0, 0, 0, 2, 3, 3].map(Some).to_vec()
    );
}

#[test]
fn records_that_decode_to_too_much_together_are_asked_for_in_parts() {
    let count = 500_000;
    let id: ArrayRef = Arc::new(StringViewArray::from(vec!["a"; count]));
    let ts: ArrayRef =
        Arc::new(TimestampMicrosecondArray::from(vec![1_000; count]).with_timezone("UTC"));
    let v: ArrayRef = Arc::new(Int64Array::from(vec![7; count]));
    let same = RecordBatch::try_from_iter([("v", v), ("id", id), ("ts", ts)]).expect("batch");
    let sent = [stream(&[same.clone(), same], Some(CompressionType::ZSTD))];
    assert!(sent[0].len() < 64_000, "{}", sent[0].len());
    let mut decoder = decoder_of("[features]\nv = \"int64\"\n", "format = \"arrow\"");
    let three = [sent[0].clone(), sent[0].clone(), sent[0].clone()];
    let records = values(&three);
    let both = decoder.decode(&records, &all(&records), 0);
    assert!(matches!(both, Err(DecodeProblem::TooMuch(_))), "{both:?}");
    let one = decoder.decode(&records, &[1], 0).expect("one fits");
    assert_eq!(one.runs[0].batch.num_rows(), 2 * count);
}

#[test]
fn a_record_is_refused_whole_for_one_row_and_its_neighbours_stay() {
    let too_large = rows(2_147_483_640..2_147_483_650);
    let mut flipped = stream(&[rows(0..2)], None);
    let middle = flipped.len() / 3;
    flipped[middle] ^= 0xFF;
    let mut cut = stream(&[rows(0..2)], None);
    cut.truncate(cut.len() - 30);
    let sent = [
        stream(&[rows(0..2)], None),
        stream(&[rows(7..8), too_large], None),
        cut,
        b"ARROW1".to_vec(),
        stream(&[rows(2..4)], None),
    ];
    let mut decoder = decoder_of(INT, "format = \"arrow\"");
    let decoded = decode(&mut decoder, &values(&sent));
    assert_eq!(shape(&decoded), [(RunKind::Upsert, vec![0, 0, 4, 4])]);
    assert_eq!(ints(&decoded, "v"), [0, 1, 2, 3].map(Some).to_vec());
    assert!(
        reason(&decoded, 1).contains("outside the range of int32"),
        "{}",
        reason(&decoded, 1)
    );
    assert!(reason(&decoded, 2).starts_with("broken Arrow stream"));
    assert!(reason(&decoded, 3).starts_with("broken Arrow stream"));
    decode(&mut decoder, &values(&[flipped]));
}

#[test]
fn types_fit_or_are_named() {
    let of = |v: ArrayRef| {
        let whole = rows(0..v.len() as i64);
        let columns = [
            ("id", whole.column(1).clone()),
            ("ts", whole.column(2).clone()),
            ("v", v),
        ];
        stream(&[RecordBatch::try_from_iter(columns).expect("batch")], None)
    };
    let words: DictionaryArray<Int32Type> = ["1", "2"].into_iter().collect();
    let cases: [(&str, ArrayRef, Result<&str, &str>); 8] = [
        ("int64", Arc::new(Int32Array::from(vec![1, 2])), Ok("1")),
        ("string", Arc::new(words.clone()), Ok("1")),
        (
            "int64",
            Arc::new(words),
            Err("field v: expected int64, found string"),
        ),
        ("double", Arc::new(Int32Array::from(vec![1])), Ok("1.0")),
        (
            "double",
            Arc::new(Int64Array::from(vec![1])),
            Err("field v: expected double, found int64"),
        ),
        (
            "int64",
            Arc::new(Float64Array::from(vec![1.0])),
            Err("field v: expected int64, found double"),
        ),
        (
            "timestamp[s, tz=UTC]",
            Arc::new(TimestampMicrosecondArray::from(vec![1_500_000])),
            Err("is finer than timestamp[s, tz=UTC]"),
        ),
        (
            "timestamp[ms, tz=UTC]",
            Arc::new(StringArray::from(vec!["2026-01-02T03:04:05.006Z"])),
            Ok("2026-01-02T03:04:05.006Z"),
        ),
    ];
    for (data_type, array, expected) in cases {
        let features = format!("[features]\nv = \"{data_type}\"\n");
        let mut decoder = decoder_of(&features, "format = \"arrow\"");
        let sent = [of(array)];
        let decoded = decode(&mut decoder, &values(&sent));
        match expected {
            Ok(text) => {
                assert!(decoded.refused.is_empty(), "{:?}", decoded.refused);
                let column = column(&decoded, "v");
                let shown = arrow_cast::display::array_value_to_string(&column, 0);
                assert_eq!(shown.expect("shown"), text, "{data_type}");
            }
            Err(words) => {
                assert!(decoded.runs.is_empty(), "{data_type}");
                assert!(
                    reason(&decoded, 0).contains(words),
                    "{}",
                    reason(&decoded, 0)
                );
            }
        }
    }
}
