use std::sync::Arc;

use arrow_array::builder::{
    FixedSizeListBuilder, Float32Builder, Int32Builder, Int64Builder, LargeListBuilder,
    ListBuilder, StringBuilder,
};
use arrow_array::{
    BinaryArray, BinaryViewArray, BooleanArray, Decimal128Array, DictionaryArray,
    FixedSizeBinaryArray, Float16Array, Float32Array, Float64Array, Int16Array, Int32Array,
    Int64Array, LargeBinaryArray, LargeStringArray, RecordBatch, StringArray, StringViewArray,
    StructArray, TimestampMicrosecondArray,
};
use arrow_schema::{Field, Fields};
use arrow_select::concat::concat;
use half::f16;

use super::*;
use crate::decode::{DecodeError, decode};

/// Puts edits into bytes as a backend would.
fn apply(bytes: &mut [u8], edits: &Edits) {
    for (offset, part) in edits.iter() {
        let start = offset as usize;
        bytes[start..start + part.len()].copy_from_slice(part);
    }
}

fn read_back(shape: &Shape, used: &Used, bytes: &[u8]) -> Result<RecordBatch, DecodeError> {
    decode(shape, used, &|offset, length| {
        Ok(bytes[offset as usize..(offset + length) as usize].to_vec())
    })
}

/// A slot with one column.
struct Slot {
    shape: Shape,
    used: Used,
    bytes: Vec<u8>,
}

impl Slot {
    fn new(array: &ArrayRef, nullable: bool) -> Slot {
        let field = Field::new("c", array.data_type().clone(), nullable);
        let fields = Fields::from(vec![field]);
        let parts = Shape::count_parts(&fields);
        let capacity = Used {
            rows: 100,
            parts: vec![1000; parts],
        };
        let shape = Shape::plan(&fields, &capacity).unwrap();
        let bytes = vec![0xEE; shape.slot_bytes as usize];
        Slot {
            shape,
            used: Used {
                rows: 0,
                parts: vec![0; parts],
            },
            bytes,
        }
    }

    fn put(&mut self, array: &ArrayRef, rows: &Rows<'_>, end: u64) {
        let mut encoder = Encoder::new(&self.shape, &self.used, Edits::default());
        encoder.column(0, array, rows).unwrap();
        let mut measure = Encoder::new(&self.shape, &self.used, Measure);
        measure.column(0, array, rows).unwrap();
        assert_eq!(
            measure.parts, encoder.parts,
            "what is measured is what is written"
        );
        self.used = Used {
            rows: end,
            parts: encoder.parts.clone(),
        };
        assert!(self.shape.fits(&self.used));
        apply(&mut self.bytes, &encoder.sink);
    }

    fn read(&self) -> ArrayRef {
        let batch = read_back(&self.shape, &self.used, &self.bytes).unwrap();
        batch.column(0).clone()
    }
}

fn lists() -> ArrayRef {
    let mut builder = ListBuilder::new(StringBuilder::new());
    for row in [
        Some(vec![Some("a"), None, Some("longer than twelve bytes")]),
        None,
        Some(vec![]),
        Some(vec![Some("another that needs the heap")]),
        Some(vec![Some("x"); 5]),
    ] {
        builder.append_option(row);
    }
    Arc::new(builder.finish())
}

fn lists_of_lists() -> ArrayRef {
    let mut builder = LargeListBuilder::new(ListBuilder::new(Int32Builder::new()));
    for outer in 0..6 {
        for inner in 0..outer % 3 {
            (0..inner + outer).for_each(|i| builder.values().values().append_value(i));
            builder.values().append(inner != 1 || outer != 5);
        }
        builder.append(outer != 4);
    }
    Arc::new(builder.finish())
}

fn vectors() -> ArrayRef {
    let mut builder = FixedSizeListBuilder::new(Float32Builder::new(), 3);
    for row in 0..5 {
        for i in 0..3 {
            builder
                .values()
                .append_option((row != 1 && i != row).then_some((row * 3 + i) as f32));
        }
        builder.append(row != 3);
    }
    Arc::new(builder.finish())
}

fn structs() -> ArrayRef {
    let mut counts = Int64Builder::new();
    let values = [Some(1), None, Some(3), Some(4), Some(5)];
    values.iter().for_each(|v| counts.append_option(*v));
    let fields = Fields::from(vec![
        Field::new("count", DataType::Int64, true),
        Field::new("tags", lists().data_type().clone(), true),
        Field::new("vector", vectors().data_type().clone(), true),
    ]);
    let nulls = NullBuffer::from(vec![true, true, false, true, true]);
    let columns: Vec<ArrayRef> = vec![Arc::new(counts.finish()), lists(), vectors()];
    Arc::new(StructArray::new(fields, columns, Some(nulls)))
}

/// Arrays of every kind of type, with nulls; what is stored where dictionaries are declared.
fn arrays() -> Vec<ArrayRef> {
    let texts = || {
        vec![
            Some("short"),
            None,
            Some("exactly 12 b"),
            Some("this one lies in the heap"),
            Some(""),
        ]
    };
    let bytes = || texts().into_iter().map(|t| t.map(str::as_bytes));
    let binary: BinaryArray = bytes().collect();
    let large_binary: LargeBinaryArray = bytes().collect();
    let binary_view: BinaryViewArray = bytes().collect();
    let dictionary: DictionaryArray<arrow_array::types::Int16Type> = texts().into_iter().collect();
    let times = TimestampMicrosecondArray::from(vec![Some(1), None, Some(i64::MIN)]);
    let decimals = Decimal128Array::from(vec![Some(-5), None, Some(i128::MAX / 10)]);
    let short = [Some([1_u8, 2, 3]), None, Some([4, 5, 6])];
    let fixed = FixedSizeBinaryArray::try_from_sparse_iter_with_size(short.into_iter(), 3);
    vec![
        Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)])),
        Arc::new(Int16Array::from(vec![Some(-1), None, Some(7)])),
        Arc::new(Int64Array::from(vec![i64::MIN, 0, i64::MAX])),
        Arc::new(Float16Array::from(vec![Some(f16::ONE), None])),
        Arc::new(Float32Array::from(vec![Some(1.5), None, Some(f32::MIN)])),
        Arc::new(Float64Array::from(vec![None, None, Some(-0.0)])),
        Arc::new(times.with_timezone("UTC")),
        Arc::new(decimals.with_precision_and_scale(38, 4).unwrap()),
        Arc::new(fixed.unwrap()),
        Arc::new(StringArray::from(texts())),
        Arc::new(LargeStringArray::from(texts())),
        Arc::new(StringViewArray::from(texts())),
        Arc::new(binary),
        Arc::new(large_binary),
        Arc::new(binary_view),
        Arc::new(dictionary),
        lists(),
        lists_of_lists(),
        vectors(),
        structs(),
    ]
}

fn stored(array: &ArrayRef) -> ArrayRef {
    arrow_cast::cast(array, &storage_type(array.data_type())).unwrap()
}

#[test]
fn every_type_comes_back_as_it_went_in() {
    for array in arrays() {
        let mut slot = Slot::new(&array, true);
        let (rows, count) = (array.len() as u64, array.len());
        slot.put(&array, &Rows::Run { first: 0, count }, rows);
        assert_eq!(&slot.read(), &stored(&array), "{}", array.data_type());
        // Slices, which begin in the midst of their buffers.
        let slice = array.slice(1, count - 1);
        let run = Rows::Run {
            first: rows,
            count: count - 1,
        };
        slot.put(&slice, &run, 2 * rows - 1);
        let expected = concat(&[&stored(&array), &stored(&slice)]).unwrap();
        assert_eq!(&slot.read(), &expected, "{} sliced", array.data_type());
    }
}

#[test]
fn scattered_rows_replace_what_was_there_and_nothing_else() {
    for array in arrays() {
        let mut slot = Slot::new(&array, true);
        let count = array.len();
        slot.put(&array, &Rows::Run { first: 0, count }, count as u64);
        // The last two elements, as rows 0 and `count`; the others stay.
        let last = count as u32 - 1;
        let pairs = vec![(last, 0), (last - 1, count as u64)];
        slot.put(&array, &Rows::Scattered(pairs.into()), count as u64 + 1);
        let all = stored(&array);
        let pieces = [
            all.slice(count - 1, 1),
            all.slice(1, count - 1),
            all.slice(count - 2, 1),
        ];
        let pieces: Vec<&dyn Array> = pieces.iter().map(AsRef::as_ref).collect();
        let expected = concat(&pieces).unwrap();
        assert_eq!(&slot.read(), &expected, "{}", array.data_type());
    }
}

#[test]
fn the_same_edits_leave_the_same_bytes() {
    for array in arrays() {
        let count = array.len();
        let mut slots = [Slot::new(&array, true), Slot::new(&array, true)];
        for slot in &mut slots {
            slot.put(&array, &Rows::Run { first: 0, count }, count as u64);
        }
        assert_eq!(slots[0].bytes, slots[1].bytes);
    }
}

#[test]
fn null_floats_are_nan_and_other_nulls_are_zero() {
    let floats: ArrayRef = Arc::new(Float32Array::from(vec![None, Some(2.0)]));
    // A null with something under it, as a computation leaves it.
    let nulls = NullBuffer::from(vec![false, true]);
    let ints: ArrayRef = Arc::new(Int32Array::new(vec![99, 7].into(), Some(nulls)));
    let (mut a, mut b) = (Slot::new(&floats, true), Slot::new(&ints, true));
    a.put(&floats, &Rows::Run { first: 0, count: 2 }, 2);
    b.put(&ints, &Rows::Run { first: 0, count: 2 }, 2);
    let float = |at: usize| f32::from_le_bytes(a.bytes[at..at + 4].try_into().unwrap());
    assert!(float(0).is_nan());
    assert_eq!(float(4), 2.0);
    assert_eq!(&b.bytes[..8], &[0, 0, 0, 0, 7, 0, 0, 0]);
    assert_eq!(&b.bytes[4096..4098], &[0, 1], "validity");
}

#[test]
fn what_lies_below_a_null_parent_is_null_too() {
    let inner = Field::new("x", DataType::Float64, false);
    let parent = StructArray::new(
        Fields::from(vec![inner]),
        vec![Arc::new(Float64Array::from(vec![1.0, 2.0]))],
        Some(NullBuffer::from(vec![true, false])),
    );
    let parent: ArrayRef = Arc::new(parent);
    let mut slot = Slot::new(&parent, true);
    slot.put(&parent, &Rows::Run { first: 0, count: 2 }, 2);
    let Node::Struct { children, .. } = &slot.shape.columns[0].node else {
        panic!("a struct");
    };
    let Node::Fixed { values, .. } = children[0].node else {
        panic!("a fixed child");
    };
    let at = values as usize + 8;
    let hidden = f64::from_le_bytes(slot.bytes[at..at + 8].try_into().unwrap());
    assert!(hidden.is_nan());
}

#[test]
fn a_whole_column_is_one_write_and_a_changed_row_is_its_bytes() {
    let array: ArrayRef = Arc::new(Int64Array::from((0..64).collect::<Vec<_>>()));
    let slot = Slot::new(&array, true);
    let mut encoder = Encoder::new(&slot.shape, &slot.used, Edits::default());
    encoder
        .column(
            0,
            &array,
            &Rows::Run {
                first: 3,
                count: 64,
            },
        )
        .unwrap();
    assert_eq!((encoder.sink.len(), encoder.sink.bytes()), (2, 64 * 9));
    let mut encoder = Encoder::new(&slot.shape, &slot.used, Edits::default());
    let pairs = vec![(5, 9), (6, 10), (1, 40)];
    encoder
        .column(0, &array, &Rows::Scattered(pairs.into()))
        .unwrap();
    assert_eq!((encoder.sink.len(), encoder.sink.bytes()), (4, 3 * 9));
}

#[test]
fn another_type_is_refused_by_name() {
    let ints: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    let texts: ArrayRef = Arc::new(StringArray::from(vec!["1"]));
    for (declared, given) in [(&ints, &texts), (&texts, &ints), (&lists(), &vectors())] {
        let slot = Slot::new(declared, true);
        let mut encoder = Encoder::new(&slot.shape, &slot.used, Edits::default());
        let error = encoder
            .column(0, given, &Rows::Run { first: 0, count: 1 })
            .unwrap_err();
        assert!(matches!(error, EncodeError::Type { column, .. } if column == "c"));
    }
}

#[test]
fn damaged_bytes_are_errors_that_name_the_column() {
    for array in [
        Arc::new(StringArray::from(vec!["a text for the heap"])) as ArrayRef,
        lists(),
        Arc::new(BooleanArray::from(vec![true])),
    ] {
        let mut slot = Slot::new(&array, true);
        let count = array.len();
        slot.put(&array, &Rows::Run { first: 0, count }, count as u64);
        for byte in 0..slot.bytes.len() {
            let before = std::mem::replace(&mut slot.bytes[byte], 0xFE);
            match read_back(&slot.shape, &slot.used, &slot.bytes) {
                Ok(batch) => assert_eq!(batch.num_rows(), count),
                Err(DecodeError::Damaged { column, .. }) => assert_eq!(column, "c"),
                Err(other) => panic!("{other}"),
            }
            slot.bytes[byte] = before;
        }
    }
}
