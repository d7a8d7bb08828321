use std::sync::Arc;

use arrow_schema::{DataType, Field, Fields, IntervalUnit};
use pinion_schemas::parse_type;

use super::*;

fn fields(columns: &[(&str, &str, bool)]) -> Fields {
    columns
        .iter()
        .map(|(name, text, nullable)| Field::new(*name, parse_type(text).unwrap(), *nullable))
        .collect()
}

fn plan(columns: &[(&str, &str, bool)], rows: u64, parts: &[u64]) -> Shape {
    let used = Used {
        rows,
        parts: parts.to_vec(),
    };
    Shape::plan(&fields(columns), &used).unwrap()
}

/// Where every buffer begins and ends when the slot is full.
fn extents(shape: &Shape) -> Vec<(u64, u64)> {
    let full = Used {
        rows: shape.capacity_rows,
        parts: shape.parts(),
    };
    let buffers = shape.used_buffers(&full);
    let mut extents: Vec<(u64, u64)> = buffers
        .iter()
        .map(|b| (b.offset, b.offset + b.bytes))
        .collect();
    extents.sort_unstable();
    extents
}

/// Every spelling that a table can have, and what lies in a slot for it.
const TYPES: &[(&str, &str)] = &[
    ("bool", "bool"),
    ("int8", "fixed 1"),
    ("int16", "fixed 2"),
    ("int32", "fixed 4"),
    ("int64", "fixed 8"),
    ("uint8", "fixed 1"),
    ("uint16", "fixed 2"),
    ("uint32", "fixed 4"),
    ("uint64", "fixed 8"),
    ("halffloat", "fixed 2"),
    ("float", "fixed 4"),
    ("double", "fixed 8"),
    ("date32[day]", "fixed 4"),
    ("date64[ms]", "fixed 8"),
    ("timestamp[s]", "fixed 8"),
    ("timestamp[us, tz=UTC]", "fixed 8"),
    ("time32[ms]", "fixed 4"),
    ("time64[ns]", "fixed 8"),
    ("duration[ms]", "fixed 8"),
    ("decimal128(12, 2)", "fixed 16"),
    ("decimal256(50, 3)", "fixed 32"),
    ("fixed_size_binary[5]", "fixed 5"),
    ("uuid", "fixed 16"),
    ("string", "view"),
    ("large_string", "view"),
    ("string_view", "view"),
    ("binary", "view"),
    ("large_binary", "view"),
    ("binary_view", "view"),
    ("list<item: float>", "list(fixed 4)"),
    ("large_list<item: string>", "list(view)"),
    ("list<item: list<item: int8>>", "list(list(fixed 1))"),
    ("fixed_size_list<item: float>[16]", "16 of fixed 4"),
    ("fixed_size_list<item: string>[2]", "2 of view"),
    ("struct<a: int32, b: string>", "struct(fixed 4, view)"),
    (
        "dictionary<values=string, indices=int16, ordered=0>",
        "view",
    ),
    (
        "dictionary<values=int64, indices=int8, ordered=0>",
        "fixed 8",
    ),
    (
        "struct<a: list<item: dictionary<values=string, indices=int8, ordered=0>>>",
        "struct(list(view))",
    ),
];

fn spell(node: &Node) -> String {
    match node {
        Node::Fixed { width, .. } => format!("fixed {width}"),
        Node::Bool { .. } => "bool".to_owned(),
        Node::View { .. } => "view".to_owned(),
        Node::List { child, .. } => format!("list({})", spell(child)),
        Node::FixedSizeList { size, child, .. } => format!("{size} of {}", spell(child)),
        Node::Struct { children, .. } => {
            let members: Vec<String> = children.iter().map(|c| spell(&c.node)).collect();
            format!("struct({})", members.join(", "))
        }
    }
}

#[test]
fn every_type_of_a_table_has_a_node() {
    for (text, expected) in TYPES {
        for nullable in [false, true] {
            let shape = plan(&[("c", text, nullable)], 1000, &[5000, 6000, 7000]);
            let column = &shape.columns[0];
            assert_eq!(&spell(&column.node), expected, "{text}");
            assert_eq!(column.node.validity().is_some(), nullable, "{text}");
            assert_eq!(column.data_type, parse_type(text).unwrap());
            let fields = fields(&[("c", text, nullable)]);
            assert_eq!(shape.parts().len(), Shape::count_parts(&fields), "{text}");
        }
    }
}

#[test]
fn buffers_start_on_4096_and_never_overlap() {
    let columns: Vec<(String, &str)> = TYPES
        .iter()
        .enumerate()
        .map(|(i, (text, _))| (format!("c{i}"), *text))
        .collect();
    let columns: Vec<(&str, &str, bool)> = columns
        .iter()
        .enumerate()
        .map(|(i, (name, text))| (name.as_str(), *text, i % 3 != 0))
        .collect();
    let parts = Shape::count_parts(&fields(&columns));
    for rows in [0, 1, 4095, 4096, 4097, 100_000] {
        let parts: Vec<u64> = (0..parts as u64).map(|i| i * 1013 + rows).collect();
        let shape = plan(&columns, rows, &parts);
        assert_eq!(shape.parts(), parts, "capacities are kept");
        let extents = extents(&shape);
        for (start, end) in &extents {
            assert_eq!(start % ALIGNMENT, 0);
            assert!(*end <= shape.slot_bytes);
        }
        for pair in extents.windows(2) {
            assert!(pair[0].1 <= pair[1].0, "{pair:?} at {rows} rows");
        }
    }
}

#[test]
fn columns_of_one_type_are_a_matrix_at_one_pitch_wherever_they_stand() {
    let columns = [
        ("a", "float", true),
        ("s", "string", true),
        ("b", "double", false),
        ("c", "float", false),
        ("d", "int32", true),
        ("e", "bool", true),
        ("f", "float", true),
    ];
    let shape = plan(&columns, 5000, &[100]);
    let values = |name: &str| -> (u64, u64) {
        let column = shape.columns.iter().find(|c| c.name == name).unwrap();
        match column.node {
            Node::Fixed { values, pitch, .. } | Node::Bool { values, pitch, .. } => (values, pitch),
            _ => panic!("{name}"),
        }
    };
    let (first, pitch) = values("a");
    assert_eq!(pitch, (5000_u64 * 4).next_multiple_of(4096));
    assert_eq!(values("c"), (first + pitch, pitch));
    assert_eq!(values("f"), (first + 2 * pitch, pitch));
    assert_eq!(values("e").0, 0, "the narrowest first");
    assert!(values("b").0 > values("d").0, "the widest last");
    let names: Vec<&str> = shape.columns.iter().map(|c| c.name.as_str()).collect();
    assert_eq!(names, ["a", "s", "b", "c", "d", "e", "f"], "as asked for");
    // Their masks are a matrix too.
    let validity = |at: usize| shape.columns[at].node.validity().unwrap();
    assert_eq!(validity(6), validity(0) + 8192);
}

#[test]
fn what_no_table_can_have_is_refused_by_name() {
    let of = |data_type: DataType| -> LayoutError {
        let fields: Fields = vec![Field::new("odd", data_type, true)].into();
        Shape::plan(&fields, &Used::default()).unwrap_err()
    };
    for data_type in [
        DataType::Null,
        DataType::Interval(IntervalUnit::MonthDayNano),
        DataType::ListView(Arc::new(Field::new("item", DataType::Int8, true))),
        DataType::Struct(vec![Field::new("n", DataType::Null, true)].into()),
    ] {
        let error = of(data_type.clone());
        assert!(
            matches!(&error, LayoutError::Unsupported { column, .. } if column == "odd"),
            "{data_type}: {error}"
        );
    }
}

#[test]
fn a_capacity_past_64_bits_is_refused() {
    let fields = fields(&[("a", "decimal256(50, 3)", false)]);
    for rows in [u64::MAX, u64::MAX / 32, i64::MAX as u64 / 32] {
        let used = Used {
            rows,
            parts: Vec::new(),
        };
        let error = Shape::plan(&fields, &used).unwrap_err();
        assert_eq!(
            error,
            LayoutError::TooLarge {
                capacity_rows: rows
            }
        );
    }
    let nested = self::fields(&[("l", "fixed_size_list<item: int64>[1000]", false)]);
    let used = Used {
        rows: u64::MAX / 999,
        parts: Vec::new(),
    };
    assert!(Shape::plan(&nested, &used).is_err());
}

#[test]
fn only_what_is_in_use_counts_as_a_buffer() {
    let columns = [("k", "int64", false), ("t", "list<item: string>", true)];
    let shape = plan(&columns, 100, &[50, 4000]);
    assert_eq!(
        shape.used_buffers(&Used {
            rows: 0,
            parts: vec![0, 0]
        }),
        []
    );
    let used = Used {
        rows: 10,
        parts: vec![7, 90],
    };
    assert!(shape.fits(&used));
    let found: Vec<(String, u64)> = shape
        .used_buffers(&used)
        .into_iter()
        .map(|b| (format!("{}.{}", b.column, b.buffer), b.bytes))
        .collect();
    let expected = [
        ("k.values", 80),
        ("t.validity", 10),
        ("t.offsets", 80),
        ("t.sizes", 80),
        ("t.child.validity", 7),
        ("t.child.views", 112),
        ("t.child.heap", 90),
    ];
    assert_eq!(found, expected.map(|(p, n)| (p.to_owned(), n)));
    let empty = Used {
        rows: 0,
        parts: vec![0, 0],
    };
    assert_eq!(shape.buffers(&empty).len(), expected.len());
    for full in [
        Used {
            rows: 101,
            parts: vec![0, 0],
        },
        Used {
            rows: 1,
            parts: vec![51, 0],
        },
        Used {
            rows: 1,
            parts: vec![0, 4001],
        },
        Used {
            rows: 1,
            parts: vec![0],
        },
    ] {
        assert!(!shape.fits(&full), "{full:?}");
    }
}

#[test]
fn the_json_of_a_layout_is_what_the_protocol_says() {
    let columns = [
        ("age", "int16", true),
        ("flag", "bool", false),
        ("name", "string", true),
        ("tags", "list<item: float>", false),
        ("vec", "fixed_size_list<item: float not null>[2]", false),
        ("s", "struct<x: int8>", true),
    ];
    let layout = Layout {
        number: 3,
        kind: PinMode::Fresh,
        device: DeviceInfo {
            kind: DeviceKind::Host,
            ordinal: 0,
            uuid: "host".to_owned(),
            name: "host memory".to_owned(),
        },
        slots: 2,
        shape: plan(&columns, 10, &[100, 20]),
    };
    let expected = serde_json::json!({
        "layout": 3, "kind": "fresh", "slots": 2, "capacity_rows": 10, "slot_bytes": 14 * 4096,
        "device": {"kind": "host", "uuid": "host", "ordinal": 0},
        "columns": [
            {"name": "age", "type": "int16", "nullable": true, "node":
                {"kind": "fixed", "width": 2, "values": 4096, "pitch": 4096, "validity": 8192}},
            {"name": "flag", "type": "bool", "nullable": false, "node":
                {"kind": "bool", "values": 0, "pitch": 4096, "validity": null}},
            {"name": "name", "type": "string", "nullable": true, "node":
                {"kind": "view", "views": 12288, "validity": 16384, "heap": 20480, "heap_bytes": 100}},
            {"name": "tags", "type": "list<item: float>", "nullable": false, "node":
                {"kind": "list", "offsets": 24576, "sizes": 28672, "validity": null,
                 "child_capacity": 20, "child":
                    {"kind": "fixed", "width": 4, "values": 32768, "pitch": 4096, "validity": 36864}}},
            {"name": "vec", "type": "fixed_size_list<item: float not null>[2]", "nullable": false,
             "node": {"kind": "fixed_size_list", "size": 2, "validity": null, "child":
                    {"kind": "fixed", "width": 4, "values": 40960, "pitch": 4096, "validity": null}}},
            {"name": "s", "type": "struct<x: int8>", "nullable": true, "node":
                {"kind": "struct", "validity": 45056, "children": [
                    {"name": "x", "type": "int8", "nullable": true, "node":
                        {"kind": "fixed", "width": 1, "values": 49152, "pitch": 4096,
                         "validity": 53248}}]}},
        ],
    });
    let found = serde_json::to_value(&layout).unwrap();
    assert_eq!(found, expected);
}

#[test]
fn columns_without_nulls_share_one_validity_and_the_others_keep_theirs() {
    let columns = [
        ("a", "double", true),
        ("key", "int64", false),
        ("b", "double", true),
        ("with nulls", "double", true),
        ("flag", "bool", true),
        ("text", "string", true),
    ];
    let fields = fields(&columns);
    let used = Used {
        rows: 10_000,
        parts: vec![100],
    };
    let without_nulls = [true, true, true, false, true, true];
    let shape = Shape::plan_sharing(&fields, &used, &without_nulls).unwrap();
    let shared = shape.shared_validity;
    assert!(shared.is_some());
    let validity: Vec<Option<u64>> = shape.columns.iter().map(|c| c.node.validity()).collect();
    assert_eq!([validity[0], validity[2], validity[4]], [shared; 3]);
    assert_eq!(validity[1], None);
    let mut distinct = extents(&shape);
    distinct.dedup();
    for pair in distinct.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "{pair:?}");
    }
    let apart = Shape::plan(&fields, &used).unwrap();
    assert_eq!(apart.shared_validity, None);
    assert_eq!(apart.slot_bytes - shape.slot_bytes, 2 * 12_288);
    let none = Shape::plan_sharing(&fields, &used, &[false; 6]).unwrap();
    assert_eq!(none, apart);
}
