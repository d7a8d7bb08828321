use std::sync::Arc;

use arrow_array::types::Int32Type;
use arrow_array::{
    Array, ArrayRef, BooleanArray, Float32Array, Int64Array, ListArray, StringArray,
    StringViewArray, StructArray, UnionArray,
};
use arrow_ipc::CompressionType;
use arrow_ipc::writer::{DictionaryTracker, IpcDataGenerator, IpcWriteContext, IpcWriteOptions};
use arrow_schema::UnionFields;

use super::*;
use crate::pool::BufferPool;

/// Columns of each shape that the layout knows.
fn columns(rows: i64) -> RecordBatch {
    let some = |i: i64| (i % 3 != 1).then_some(i);
    let numbers: ArrayRef = Arc::new(Int64Array::from_iter((0..rows).map(some)));
    let texts = || (0..rows).map(|i| some(i).map(|i| format!("text that is not short {i}")));
    let lists = (0..rows).map(|i| some(i).map(|i| vec![Some(i as i32); 3]));
    let structs = StructArray::new(
        vec![Field::new("n", DataType::Int64, true)].into(),
        vec![Arc::clone(&numbers)],
        Some((0..rows).map(|i| i % 2 == 0).collect::<Vec<_>>().into()),
    );
    let unions = UnionArray::try_new(
        UnionFields::try_new([0], [Field::new("n", DataType::Int64, true)]).unwrap(),
        vec![0; rows as usize].into(),
        Some((0..rows as i32).collect::<Vec<_>>().into()),
        vec![Arc::clone(&numbers)],
    )
    .unwrap();
    RecordBatch::try_from_iter([
        ("int64", numbers),
        (
            "float",
            Arc::new(Float32Array::from_iter(
                (0..rows).map(|i| some(i).map(|i| i as f32)),
            )) as _,
        ),
        (
            "flag",
            Arc::new(BooleanArray::from_iter(
                (0..rows).map(|i| some(i).map(|i| i > 9)),
            )) as _,
        ),
        ("text", Arc::new(StringArray::from_iter(texts())) as _),
        ("view", Arc::new(StringViewArray::from_iter(texts())) as _),
        (
            "list",
            Arc::new(ListArray::from_iter_primitive::<Int32Type, _, _>(lists)) as _,
        ),
        ("struct", Arc::new(structs) as _),
        ("union", Arc::new(unions) as _),
    ])
    .unwrap()
}

fn encoded(batch: &RecordBatch, codec: Option<CompressionType>) -> (Vec<u8>, Vec<u8>) {
    let options = IpcWriteOptions::default()
        .try_with_compression(codec)
        .unwrap();
    let (_, message) = IpcDataGenerator::default()
        .encode(
            batch,
            &mut DictionaryTracker::new(false),
            &options,
            &mut IpcWriteContext::default(),
        )
        .unwrap();
    (message.ipc_message, message.arrow_data)
}

fn body_of(bytes: &[u8]) -> Buffer {
    let mut memory = BufferPool::new(0).take(bytes.len());
    memory.as_slice_mut().copy_from_slice(bytes);
    memory.into_arrow()
}

/// A small generator of numbers, so that a failure can be repeated.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) as usize % limit
    }
}

#[test]
fn mutated_messages_are_refused_or_give_valid_rows_and_never_panic() {
    let all = columns(100);
    let flat = all.project(&[0, 1, 2, 3]).unwrap();
    let mut numbers = Numbers(7);
    let (mut refused, mut admitted) = (0, 0);
    for (batch, codec) in [
        (&all, None),
        (&flat, None),
        (&all, Some(CompressionType::ZSTD)),
    ] {
        let (header, body) = encoded(batch, codec);
        let whole = body_of(&body);
        for round in 0..20_000 {
            let mut header = header.clone();
            let mut mutated = None;
            for _ in 0..1 + numbers.below(3) {
                let value = [0, 1, 0x7F, 0x80, 0xFF, numbers.below(256) as u8][numbers.below(6)];
                if round % 4 == 0 {
                    let bytes = mutated.get_or_insert_with(|| body.clone());
                    let at = numbers.below(bytes.len());
                    bytes[at] = value;
                } else {
                    let at = numbers.below(header.len());
                    header[at] = value;
                }
            }
            let body = match (&mutated, numbers.below(20)) {
                (Some(bytes), _) => body_of(bytes),
                (None, 0) => whole.slice_with_length(0, numbers.below(whole.len())),
                (None, _) => whole.clone(),
            };
            let mut decoder = StreamDecoder::with_schema(batch.schema(), 1 << 20).unwrap();
            match decoder.decode(&header, &body) {
                Ok(Decoded::Batch(batch)) => {
                    admitted += 1;
                    for column in batch.columns() {
                        column.to_data().validate_full().unwrap();
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    let words = error.to_string();
                    assert!(!words.contains(PANICKED), "{words}");
                    refused += 1;
                }
            }
        }
    }
    assert!(refused > 10_000 && admitted > 5_000, "{refused} {admitted}");
}

#[test]
fn what_a_message_claims_is_compared_with_what_came() {
    let batch = columns(10).project(&[0, 3]).unwrap();
    let (header, body) = encoded(&batch, None);
    let decode = |schema: SchemaRef, header: &[u8], body: &[u8]| {
        StreamDecoder::with_schema(schema, 1 << 20)
            .unwrap()
            .decode(header, &body_of(body))
    };
    assert!(decode(batch.schema(), &header, &body).is_ok());
    let short = decode(batch.schema(), &header, &body[..body.len() - 8]).unwrap_err();
    assert!(short.to_string().contains("announced"), "{short}");
    // Of another schema: too few and too many nodes.
    for columns in [&[0][..], &[0, 3, 1]] {
        let schema = super::tests::columns(1).project(columns).unwrap().schema();
        assert!(decode(schema, &header, &body).is_err());
    }
    // As many nodes and buffers, wider values.
    let wide = Schema::new(vec![
        Field::new("n", DataType::Decimal256(50, 0), true),
        Field::new("t", DataType::Utf8, true),
    ]);
    let error = decode(Arc::new(wide), &header, &body).unwrap_err();
    assert!(error.to_string().contains("its rows need 320"), "{error}");
}

#[test]
fn strings_must_be_utf8_with_ascending_offsets() {
    let batch = RecordBatch::try_from_iter([(
        "text",
        Arc::new(StringArray::from(vec!["ab", "cd", "ef"])) as ArrayRef,
    )])
    .unwrap();
    let (header, body) = encoded(&batch, None);
    let decode = |body: &[u8]| {
        StreamDecoder::with_schema(batch.schema(), 0)
            .unwrap()
            .decode(&header, &body_of(body))
    };
    let offsets_at = body
        .windows(8)
        .position(|w| w == [0, 0, 0, 0, 2, 0, 0, 0])
        .unwrap();
    let text_at = body.windows(6).position(|w| w == b"abcdef").unwrap();
    let mut broken = body.clone();
    broken[text_at + 3] = 0xFF;
    assert!(decode(&broken).is_err());
    for offset in [5, 0xFF] {
        let mut broken = body.clone();
        broken[offsets_at + 4] = offset;
        assert!(decode(&broken).is_err(), "{offset}");
    }
    let mut split = body.clone();
    split[text_at + 1..text_at + 3].copy_from_slice("é".as_bytes());
    assert!(
        decode(&split).is_err(),
        "a value that ends within a character"
    );
}

#[test]
fn a_small_message_cannot_inflate_without_bound() {
    let batch = RecordBatch::try_from_iter([(
        "zeros",
        Arc::new(Int64Array::from(vec![0; 1 << 20])) as ArrayRef,
    )])
    .unwrap();
    let (header, body) = encoded(&batch, Some(CompressionType::ZSTD));
    assert!(body.len() < 10_000);
    let decode = |limit| {
        StreamDecoder::with_schema(batch.schema(), limit)
            .unwrap()
            .decode(&header, &body_of(&body))
    };
    // The values, and a bitmap that says that none is null.
    assert!(decode((8 << 20) + (1 << 17)).is_ok());
    assert!(decode((8 << 20) - 1).is_err());
}
