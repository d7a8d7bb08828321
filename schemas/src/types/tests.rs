use proptest::prelude::*;

use super::*;
use arrow_schema::Fields;

fn list(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", item, true)))
}

#[test]
fn arrow_and_pyarrow_names_mean_the_same() {
    let utc = |unit| DataType::Timestamp(unit, Some("UTC".into()));
    let vector = DataType::FixedSizeList(Arc::new(Field::new("item", DataType::Float32, true)), 64);
    let point = DataType::Struct(Fields::from(vec![
        Field::new("a", DataType::Int32, true),
        Field::new("b", DataType::Utf8, false),
    ]));
    let words = DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8));
    for (spellings, data_type, printed) in [
        (&["double", "float64"][..], DataType::Float64, "double"),
        (&["float", "float32"], DataType::Float32, "float"),
        (&["halffloat", "float16"], DataType::Float16, "halffloat"),
        (&["string", "utf8"], DataType::Utf8, "string"),
        (
            &["large_string", "large_utf8"],
            DataType::LargeUtf8,
            "large_string",
        ),
        (
            &["string_view", "utf8_view"],
            DataType::Utf8View,
            "string_view",
        ),
        (&["bool", "boolean"], DataType::Boolean, "bool"),
        (&["uint8"], DataType::UInt8, "uint8"),
        (&["binary_view"], DataType::BinaryView, "binary_view"),
        (
            &["uuid", "fixed_size_binary[16]", "fixed_size_binary[ 16 ]"],
            DataType::FixedSizeBinary(16),
            "fixed_size_binary[16]",
        ),
        (&["date32", "date32[day]"], DataType::Date32, "date32[day]"),
        (&["date64", "date64[ms]"], DataType::Date64, "date64[ms]"),
        (
            &["time32[s]"],
            DataType::Time32(TimeUnit::Second),
            "time32[s]",
        ),
        (
            &["time64[ns]"],
            DataType::Time64(TimeUnit::Nanosecond),
            "time64[ns]",
        ),
        (
            &["duration[us]"],
            DataType::Duration(TimeUnit::Microsecond),
            "duration[us]",
        ),
        (
            &["timestamp[ns]"],
            DataType::Timestamp(TimeUnit::Nanosecond, None),
            "timestamp[ns]",
        ),
        (
            &[
                "timestamp[us, tz=UTC]",
                "timestamp[us,tz=UTC]",
                " timestamp [us , tz = UTC ] ",
            ],
            utc(TimeUnit::Microsecond),
            "timestamp[us, tz=UTC]",
        ),
        (
            &["timestamp[s, tz=America/New_York]"],
            DataType::Timestamp(TimeUnit::Second, Some("America/New_York".into())),
            "timestamp[s, tz=America/New_York]",
        ),
        (
            &["timestamp[s, tz=+02:00]"],
            DataType::Timestamp(TimeUnit::Second, Some("+02:00".into())),
            "timestamp[s, tz=+02:00]",
        ),
        (
            &["decimal128(10, 2)", "decimal(10,2)"],
            DataType::Decimal128(10, 2),
            "decimal128(10, 2)",
        ),
        (
            &["decimal128(5)"],
            DataType::Decimal128(5, 0),
            "decimal128(5, 0)",
        ),
        (
            &["decimal(5, -2)"],
            DataType::Decimal128(5, -2),
            "decimal128(5, -2)",
        ),
        (
            &["decimal256(50, 3)", "decimal(50, 3)"],
            DataType::Decimal256(50, 3),
            "decimal256(50, 3)",
        ),
        (
            &[
                "dictionary<values=string, indices=int32, ordered=0>",
                "dictionary<indices=int32, values=utf8>",
                "dictionary<values=string>",
            ],
            words.clone(),
            "dictionary<values=string, indices=int32, ordered=0>",
        ),
        (
            &["list<item: float>", "list<float>", "list< float32 >"],
            list(DataType::Float32),
            "list<item: float>",
        ),
        (
            &["list<item: list<item: string>>", "list<list<string>>"],
            list(list(DataType::Utf8)),
            "list<item: list<item: string>>",
        ),
        (
            &["list<dictionary<values=string>>"],
            list(words),
            "list<item: dictionary<values=string, indices=int32, ordered=0>>",
        ),
        (
            &["large_list<element: int8 not null>"],
            DataType::LargeList(Arc::new(Field::new("element", DataType::Int8, false))),
            "large_list<element: int8 not null>",
        ),
        (
            &[
                "fixed_size_list<item: float>[64]",
                "list<item: float>[64]",
                "list<float>[64]",
                "fixed_size_list<float>[64]",
            ],
            vector,
            "fixed_size_list<item: float>[64]",
        ),
        (
            &[
                "struct<a: int32, b: string not null>",
                "struct<a:int32,b:utf8 not null>",
            ],
            point,
            "struct<a: int32, b: string not null>",
        ),
    ] {
        for spelling in spellings {
            assert_eq!(parse_type(spelling).as_ref(), Ok(&data_type), "{spelling}");
        }
        assert_eq!(format_type(&data_type), printed);
    }
}

#[test]
fn every_plain_name_parses_and_prints() {
    for (name, data_type) in SIMPLE {
        assert_eq!(parse_type(name).as_ref(), Ok(data_type));
        assert_eq!(parse_type(&format_type(data_type)).as_ref(), Ok(data_type));
    }
}

#[test]
fn a_misspelt_type_names_the_nearest_known_one() {
    for (text, message) in [
        (
            "flaot64",
            "unknown type \"flaot64\"; did you mean \"float64\"?",
        ),
        ("Int64", "unknown type \"Int64\"; did you mean \"int64\"?"),
        ("str", "unknown type \"str\""),
        (
            "list<strng>",
            "unknown type \"strng\"; did you mean \"string\"?",
        ),
        (
            "timestmp[us]",
            "unknown type \"timestmp\"; did you mean \"timestamp[us, tz=UTC]\"?",
        ),
        (
            "timestamp[us, tz=Europe/Berln]",
            "unknown time zone \"Europe/Berln\"; did you mean \"Europe/Berlin\"?",
        ),
        (
            "timestamp[min]",
            "unknown unit \"min\" of timestamp (known: s, ms, us, ns)",
        ),
        ("time32[us]", "unknown unit \"us\" of time32 (known: s, ms)"),
        ("map<string, int32>", "a feature cannot be of type \"map\""),
        (
            "double precision",
            "\"precision\" is left over after the type \"double\"",
        ),
        (
            "list<float",
            "\">\" is due in list<item: type>, found the end",
        ),
        (
            "timestamp",
            "\"[\" is due in timestamp[unit, tz=zone], found the end",
        ),
        (
            "decimal128(39, 2)",
            "the precision \"39\" of decimal128 is not a number from 1 to 38",
        ),
        (
            "decimal(4, 5)",
            "the scale \"5\" of decimal is not a number from -4 to 4",
        ),
    ] {
        assert_eq!(parse_type(text).unwrap_err().to_string(), message, "{text}");
    }
}

#[test]
fn hostile_types_are_refused() {
    let deep = format!("{}int8{}", "list<".repeat(1000), ">".repeat(1000));
    let long = format!("struct<{}>", "a: int8, ".repeat(10_000));
    for text in [
        "",
        " ",
        "\u{1b}[31m",
        "list<>",
        "struct<>",
        "struct<a>",
        "struct<a: int8, a: int8>",
        "struct<\u{7}: int8>",
        "list<float>[0]",
        "list<float>[-1]",
        "list<float>[1048577]",
        "list<list<float>[1000000]>[1000000]",
        "fixed_size_binary[99999999999]",
        "dictionary<values=string, indices=float>",
        "dictionary<indices=int8>",
        "dictionary<values=list<int8>>",
        "dictionary<values=dictionary<values=string>>",
        "dictionary<values=string, ordered=1>",
        "timestamp[us, tz=+25:00]",
        "timestamp[us, tz=]",
        deep.as_str(),
        long.as_str(),
    ] {
        let error = parse_type(text).unwrap_err().to_string();
        assert!(!error.contains('\u{1b}') && error.len() < 400, "{error}");
    }
}

#[test]
fn nesting_is_limited_to_sixteen_levels() {
    let nested = |levels: usize| {
        let lists = levels - 1;
        format!("{}int8{}", "list<".repeat(lists), ">".repeat(lists))
    };
    assert!(parse_type(&nested(16)).is_ok());
    assert_eq!(
        parse_type(&nested(17)).unwrap_err().problem,
        "the type is nested deeper than 16 levels"
    );
}

#[test]
fn storage_types_have_no_dictionary_at_any_depth() {
    let declared = parse_type(
        "struct<a: list<item: dictionary<values=string>>, b: dictionary<values=int64> not null>",
    );
    let stored = parse_type("struct<a: list<item: string>, b: int64 not null>");
    assert_eq!(storage_type(&declared.unwrap()), stored.unwrap());
}

fn any_type() -> impl Strategy<Value = DataType> {
    let plain: Vec<DataType> = SIMPLE.iter().map(|(_, plain)| plain.clone()).collect();
    let units = || {
        prop::sample::select(vec![
            TimeUnit::Second,
            TimeUnit::Millisecond,
            TimeUnit::Microsecond,
            TimeUnit::Nanosecond,
        ])
    };
    let zones = prop::option::of(prop::sample::select(vec!["UTC", "Asia/Kolkata", "-03:30"]));
    let leaf = prop_oneof![
        prop::sample::select(plain),
        (units(), zones).prop_map(|(unit, zone)| DataType::Timestamp(unit, zone.map(Arc::from))),
        units().prop_map(DataType::Duration),
        (1..=38_u8, -1..=1_i8).prop_map(|(digits, scale)| DataType::Decimal128(digits, scale)),
        (39..=76_u8, 0..=9_i8).prop_map(|(digits, scale)| DataType::Decimal256(digits, scale)),
        (1..100_i32).prop_map(DataType::FixedSizeBinary),
        Just(DataType::Dictionary(
            Box::new(DataType::UInt16),
            Box::new(DataType::LargeUtf8)
        )),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let child = ("[a-z ]{0,3}[a-z_.$é-]{1,8}", inner, any::<bool>()).prop_map(
            |(name, data_type, nullable)| Arc::new(Field::new(name.trim(), data_type, nullable)),
        );
        prop_oneof![
            child.clone().prop_map(DataType::List),
            child.clone().prop_map(DataType::LargeList),
            (child.clone(), 1..20_i32)
                .prop_map(|(child, size)| DataType::FixedSizeList(child, size)),
            prop::collection::vec(child, 1..4).prop_map(|mut members| {
                let mut seen = std::collections::HashSet::new();
                members.retain(|member| seen.insert(member.name().clone()));
                DataType::Struct(Fields::from(members))
            }),
        ]
    })
}

proptest! {
    #[test]
    fn a_printed_type_parses_back(data_type in any_type()) {
        let text = format_type(&data_type);
        prop_assert_eq!(parse_type(&text), Ok(data_type), "{}", text);
    }

    #[test]
    fn no_text_makes_the_parser_panic(text in "[a-z0-9<>:,=\\[\\]() é]{0,40}") {
        let _ = parse_type(&text);
    }
}
