use std::collections::HashMap;
use std::io::Cursor;
use std::sync::Arc;

use arrow_array::builder::{
    FixedSizeListBuilder, Float32Builder, Int64Builder, ListBuilder, StringDictionaryBuilder,
    StringViewBuilder,
};
use arrow_array::types::Int8Type;
use arrow_array::{
    ArrayRef, BooleanArray, DictionaryArray, Float64Array, Int8Array, Int64Array, NullArray,
    RecordBatch, StringArray, StructArray, TimestampSecondArray,
};
use arrow_buffer::Buffer;
use arrow_ipc::writer::{
    DictionaryTracker, FileWriter, IpcDataGenerator, IpcWriteContext, IpcWriteOptions, StreamWriter,
};
use arrow_ipc::{
    BodyCompressionArgs, BodyCompressionMethod, CompressionType, FieldNode, MessageArgs,
    MessageHeader, MetadataVersion, RecordBatchArgs,
};
use arrow_schema::{DataType, Field, Schema};
use flatbuffers::FlatBufferBuilder;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

/// Headers and bodies of a stream of one batch.
fn messages(batch: &RecordBatch, options: &IpcWriteOptions) -> Vec<(Vec<u8>, Vec<u8>)> {
    let generator = IpcDataGenerator::default();
    let mut tracker = DictionaryTracker::new(false);
    let schema =
        generator.schema_to_bytes_with_dictionary_tracker(&batch.schema(), &mut tracker, options);
    let (dictionaries, encoded) = generator
        .encode(
            batch,
            &mut tracker,
            options,
            &mut IpcWriteContext::default(),
        )
        .unwrap();
    std::iter::once(schema)
        .chain(dictionaries)
        .chain(std::iter::once(encoded))
        .map(|message| (message.ipc_message, message.arrow_data))
        .collect()
}

fn run(messages: &[(Vec<u8>, Vec<u8>)], limits: GateLimits) -> Result<Vec<RecordBatch>, GateError> {
    let mut gate = Gate::new(limits);
    let mut batches = Vec::new();
    for (header, body) in messages {
        if let Admitted::Batch(batch) = gate.admit(header, &Buffer::from(body.as_slice()))? {
            batches.push(batch);
        }
    }
    Ok(batches)
}

fn wide_batch() -> RecordBatch {
    let mut dictionary = StringDictionaryBuilder::<Int8Type>::new();
    let mut views = StringViewBuilder::new();
    let mut lists = ListBuilder::new(Int64Builder::new());
    let mut vectors = FixedSizeListBuilder::new(Float32Builder::new(), 4);
    for row in 0..50i64 {
        dictionary.append_value(["red", "green", "blue"][row as usize % 3]);
        views.append_value(format!("a view longer than twelve bytes, number {row}"));
        lists.values().append_slice(&[row, row + 1]);
        lists.append(row % 7 != 0);
        vectors.values().append_slice(&[row as f32; 4]);
        vectors.append(true);
    }
    let strings: StringArray = (0..50)
        .map(|i| (i % 5 != 0).then(|| format!("s{i}")))
        .collect();
    let inner: ArrayRef = Arc::new(Int64Array::from_iter_values(0..50));
    let nested = StructArray::from(vec![(
        Arc::new(Field::new("inner", DataType::Int64, true)),
        inner,
    )]);
    RecordBatch::try_from_iter_with_nullable(vec![
        (
            "f",
            Arc::new(Float64Array::from_iter_values((0..50).map(f64::from))) as ArrayRef,
            true,
        ),
        ("s", Arc::new(strings) as ArrayRef, true),
        ("d", Arc::new(dictionary.finish()) as ArrayRef, true),
        ("v", Arc::new(views.finish()) as ArrayRef, true),
        ("l", Arc::new(lists.finish()) as ArrayRef, true),
        ("x", Arc::new(vectors.finish()) as ArrayRef, true),
        ("n", Arc::new(nested) as ArrayRef, true),
        (
            "t",
            Arc::new(TimestampSecondArray::from_iter_values(0..50)) as ArrayRef,
            true,
        ),
        (
            "b",
            Arc::new(BooleanArray::from(vec![true; 50])) as ArrayRef,
            true,
        ),
        ("z", Arc::new(NullArray::new(50)) as ArrayRef, true),
    ])
    .unwrap()
}

fn compressed(codec: CompressionType) -> IpcWriteOptions {
    IpcWriteOptions::default()
        .try_with_compression(Some(codec))
        .unwrap()
}

#[test]
fn a_good_batch_passes_unchanged_plain_and_compressed() {
    let batch = wide_batch();
    for options in [
        IpcWriteOptions::default(),
        compressed(CompressionType::ZSTD),
        compressed(CompressionType::LZ4_FRAME),
    ] {
        let passed = run(&messages(&batch, &options), GateLimits::default()).unwrap();
        assert_eq!(passed, vec![batch.clone()]);
    }
}

#[test]
fn files_and_streams_read_as_they_were_written() {
    let batch = wide_batch();
    let mut file = Vec::new();
    let mut writer = FileWriter::try_new(&mut file, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);
    let mut stream = Vec::new();
    let mut writer = StreamWriter::try_new(&mut stream, &batch.schema()).unwrap();
    writer.write(&batch).unwrap();
    writer.finish().unwrap();
    drop(writer);

    let read = |bytes: &[u8]| {
        let reader = GatedReader::open(Cursor::new(bytes.to_vec()), GateLimits::for_files())?;
        assert_eq!(reader.schema(), batch.schema());
        reader.collect::<Result<Vec<_>, _>>()
    };
    assert_eq!(read(&file).unwrap().len(), 2);
    assert_eq!(read(&stream).unwrap(), vec![batch.clone()]);
    for cut in [3, 7, 40, file.len() / 2, file.len() - 7] {
        assert!(read(&file[..cut]).is_err(), "cut at {cut}");
    }
}

/// One int64 column whose only compressed buffer claims `claimed` bytes.
fn claims(claimed: i64, codec: CompressionType, data: &[u8]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut body = claimed.to_le_bytes().to_vec();
    body.extend_from_slice(data);
    crafted(
        &[FieldNode::new(8, 0)],
        &[
            arrow_ipc::Buffer::new(0, 0),
            arrow_ipc::Buffer::new(0, body.len() as i64),
        ],
        8,
        Some(codec),
        body,
    )
}

/// A stream with one int64 column and a batch header made of the given parts.
fn crafted(
    nodes: &[FieldNode],
    buffers: &[arrow_ipc::Buffer],
    rows: i64,
    codec: Option<CompressionType>,
    body: Vec<u8>,
) -> Vec<(Vec<u8>, Vec<u8>)> {
    let schema = Schema::new(vec![Field::new("a", DataType::Int64, true)]);
    let batch = RecordBatch::new_empty(Arc::new(schema));
    let mut all = messages(&batch, &IpcWriteOptions::default());
    all.truncate(1);
    let mut builder = FlatBufferBuilder::new();
    let nodes = builder.create_vector(nodes);
    let buffers = builder.create_vector(buffers);
    let compression = codec.map(|codec| {
        arrow_ipc::BodyCompression::create(
            &mut builder,
            &BodyCompressionArgs {
                codec,
                method: BodyCompressionMethod::BUFFER,
            },
        )
    });
    let header = arrow_ipc::RecordBatch::create(
        &mut builder,
        &RecordBatchArgs {
            length: rows,
            nodes: Some(nodes),
            buffers: Some(buffers),
            compression,
            variadicBufferCounts: None,
        },
    );
    let message = arrow_ipc::Message::create(
        &mut builder,
        &MessageArgs {
            version: MetadataVersion::V5,
            header_type: MessageHeader::RecordBatch,
            header: Some(header.as_union_value()),
            bodyLength: body.len() as i64,
            custom_metadata: None,
        },
    );
    builder.finish(message, None);
    all.push((builder.finished_data().to_vec(), body));
    all
}

#[test]
fn a_compressed_body_that_claims_a_tebibyte_is_refused_before_it_is_inflated() {
    for codec in [CompressionType::ZSTD, CompressionType::LZ4_FRAME] {
        let error = run(&claims(1 << 40, codec, &[0; 64]), GateLimits::default()).unwrap_err();
        assert!(matches!(error, GateError::Limit { .. }), "{error}");
        let error = run(&claims(-7, codec, &[0; 64]), GateLimits::default()).unwrap_err();
        assert!(matches!(error, GateError::Malformed { .. }), "{error}");
    }
    let error = run(
        &claims(1 << 40, CompressionType::ZSTD, &[0; 64]),
        GateLimits::default(),
    );
    assert!(
        error
            .unwrap_err()
            .to_string()
            .contains("1099511627776, over the limit of")
    );
}

#[test]
fn an_lz4_frame_that_inflates_past_its_claim_is_refused() {
    // Claims 64 bytes; its blocks could hold 4 MiB each.
    let mut frame = 0x184D_2204u32.to_le_bytes().to_vec();
    frame.extend_from_slice(&[0b0110_0000, 0x70, 0x00]);
    for _ in 0..40 {
        frame.extend_from_slice(&65_536u32.to_le_bytes());
        frame.extend_from_slice(&vec![0u8; 65_536]);
    }
    frame.extend_from_slice(&[0; 4]);
    let limits = GateLimits {
        max_decoded_bytes: 64 << 20,
        ..GateLimits::default()
    };
    let error = run(&claims(64, CompressionType::LZ4_FRAME, &frame), limits).unwrap_err();
    assert!(matches!(error, GateError::Limit { .. }), "{error}");
}

#[test]
fn lengths_and_offsets_outside_the_body_are_refused() {
    let body = vec![0u8; 64];
    let node = FieldNode::new(8, 0);
    let none = arrow_ipc::Buffer::new(0, 0);
    let cases: Vec<(Vec<FieldNode>, Vec<arrow_ipc::Buffer>, i64)> = vec![
        (vec![node], vec![none, arrow_ipc::Buffer::new(0, 65)], 8),
        (vec![node], vec![none, arrow_ipc::Buffer::new(-8, 64)], 8),
        (vec![node], vec![none, arrow_ipc::Buffer::new(0, -64)], 8),
        (
            vec![node],
            vec![none, arrow_ipc::Buffer::new(i64::MAX, i64::MAX)],
            8,
        ),
        (vec![node], vec![none], 8),
        (vec![node], vec![none, none, none], 8),
        (vec![node], vec![none, arrow_ipc::Buffer::new(0, 8)], 8),
        (vec![node], vec![none, arrow_ipc::Buffer::new(0, 64)], -1),
        (
            vec![node],
            vec![none, arrow_ipc::Buffer::new(0, 64)],
            i64::MAX,
        ),
        (
            vec![FieldNode::new(-8, 0)],
            vec![none, arrow_ipc::Buffer::new(0, 64)],
            8,
        ),
        (
            vec![FieldNode::new(8, 9)],
            vec![none, arrow_ipc::Buffer::new(0, 64)],
            8,
        ),
        (
            vec![FieldNode::new(8, 3)],
            vec![none, arrow_ipc::Buffer::new(0, 64)],
            8,
        ),
        (
            vec![FieldNode::new(7, 0)],
            vec![none, arrow_ipc::Buffer::new(0, 64)],
            8,
        ),
        (
            vec![node, node],
            vec![none, arrow_ipc::Buffer::new(0, 64)],
            8,
        ),
        (vec![], vec![], 8),
    ];
    for (case, (nodes, buffers, rows)) in cases.into_iter().enumerate() {
        let error = run(
            &crafted(&nodes, &buffers, rows, None, body.clone()),
            GateLimits::default(),
        );
        assert!(error.is_err(), "case {case} was admitted");
    }
    let good = crafted(
        &[node],
        &[none, arrow_ipc::Buffer::new(0, 64)],
        8,
        None,
        body,
    );
    assert_eq!(run(&good, GateLimits::default()).unwrap()[0].num_rows(), 8);
}

#[test]
fn a_small_message_with_an_enormous_plain_form_is_refused() {
    let long = "x".repeat(1 << 20);
    let keys = Int8Array::from(vec![0i8; 100_000]);
    let values: ArrayRef = Arc::new(StringArray::from(vec![long.as_str()]));
    let dictionary: ArrayRef = Arc::new(DictionaryArray::new(keys, values));
    let mut views = StringViewBuilder::new();
    let block = views.append_block(Buffer::from(long.as_bytes()));
    for _ in 0..100_000 {
        views.try_append_view(block, 0, 1 << 20).unwrap();
    }
    for column in [dictionary, Arc::new(views.finish()) as ArrayRef] {
        let batch = RecordBatch::try_from_iter(vec![("c", column)]).unwrap();
        let sent = messages(&batch, &IpcWriteOptions::default());
        let error = run(&sent, GateLimits::default()).unwrap_err();
        assert!(error.is_limit(), "{error}");
    }
}

#[test]
fn too_many_rows_fields_or_levels_are_refused() {
    let batch = wide_batch();
    let sent = messages(&batch, &IpcWriteOptions::default());
    for limits in [
        GateLimits {
            max_rows: 49,
            ..GateLimits::default()
        },
        GateLimits {
            max_fields: 9,
            ..GateLimits::default()
        },
        GateLimits {
            max_depth: 1,
            ..GateLimits::default()
        },
        GateLimits {
            max_body_bytes: 100,
            ..GateLimits::default()
        },
        GateLimits {
            max_header_bytes: 100,
            ..GateLimits::default()
        },
    ] {
        let error = run(&sent, limits).unwrap_err();
        assert!(error.is_limit(), "{error}");
    }
}

#[test]
fn deep_nesting_is_refused_and_does_not_overflow_the_stack() {
    for levels in [17usize, 40, 200] {
        let mut data_type = DataType::Int64;
        for _ in 0..levels {
            data_type = DataType::List(Arc::new(Field::new("item", data_type, true)));
        }
        let schema = Schema::new(vec![Field::new("deep", data_type, true)]);
        let batch = RecordBatch::new_empty(Arc::new(schema));
        assert!(
            run(
                &messages(&batch, &IpcWriteOptions::default()),
                GateLimits::default()
            )
            .is_err()
        );
    }
}

#[test]
fn messages_out_of_order_are_refused() {
    let sent = messages(&wide_batch(), &IpcWriteOptions::default());
    let last = sent.last().unwrap().clone();
    assert!(matches!(
        run(&[last], GateLimits::default()),
        Err(GateError::Order { .. })
    ));
    let twice = [sent[0].clone(), sent[0].clone()];
    assert!(matches!(
        run(&twice, GateLimits::default()),
        Err(GateError::Order { .. })
    ));
}

#[test]
fn flipped_bits_never_panic_and_never_exhaust_memory() {
    // The decoder's own panics are caught; keep their reports out of the test log.
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let batch = wide_batch();
    let mut outcomes: HashMap<bool, usize> = HashMap::new();
    for options in [
        IpcWriteOptions::default(),
        compressed(CompressionType::ZSTD),
        compressed(CompressionType::LZ4_FRAME),
    ] {
        let sent = messages(&batch, &options);
        for seed in 0..3_000u64 {
            let mut random = StdRng::seed_from_u64(seed);
            let mut bad = sent.clone();
            for _ in 0..random.random_range(1..6) {
                let message = random.random_range(0..bad.len());
                let (header, body) = &mut bad[message];
                let bytes = if body.is_empty() || random.random_bool(0.6) {
                    header
                } else {
                    body
                };
                let at = random.random_range(0..bytes.len());
                match random.random_range(0..3) {
                    0 => bytes[at] ^= 1 << random.random_range(0..8),
                    1 => bytes[at] = random.random(),
                    _ => {
                        let length = random.random_range(0..bytes.len());
                        bytes.truncate(length.max(1));
                    }
                }
            }
            let admitted = run(&bad, GateLimits::default()).is_ok();
            *outcomes.entry(admitted).or_default() += 1;
        }
    }
    std::panic::set_hook(hook);
    assert!(
        outcomes[&false] > 1_000,
        "the flips hit nothing: {outcomes:?}"
    );
}

#[test]
fn random_bytes_are_refused() {
    let mut random = StdRng::seed_from_u64(7);
    for length in [0usize, 1, 7, 64, 4096] {
        let bytes: Vec<u8> = (0..length).map(|_| random.random()).collect();
        assert!(
            Gate::new(GateLimits::default())
                .admit(&bytes, &Buffer::from(&[][..]))
                .is_err()
        );
        assert!(GatedReader::open(Cursor::new(bytes), GateLimits::for_files()).is_err());
    }
}

#[test]
fn plain_bytes_count_the_rows_of_a_slice_only() {
    let batch = wide_batch();
    let bytes = |batch: &RecordBatch| -> Vec<u64> {
        batch.columns().iter().map(expand::plain_bytes).collect()
    };
    let (whole, one) = (bytes(&batch), bytes(&batch.slice(20, 1)));
    for (column, (whole, one)) in whole.iter().zip(&one).enumerate() {
        assert!(one * 5 <= *whole, "column {column}: {one} of {whole}");
    }
}

#[test]
fn batches_of_one_dictionary_add_up_in_their_plain_form() {
    let long: ArrayRef = Arc::new(StringArray::from(vec!["x".repeat(1_000)]));
    let column: ArrayRef = Arc::new(DictionaryArray::new(Int8Array::from(vec![0; 100]), long));
    let batch = RecordBatch::try_from_iter([("d", column)]).unwrap();
    let sent = messages(&batch, &IpcWriteOptions::default());
    let mut gate = Gate::new(GateLimits::default());
    for (header, body) in sent.iter().chain(sent.last()) {
        gate.admit(header, &Buffer::from(body.as_slice())).unwrap();
    }
    assert_eq!(gate.plain_bytes(), 2 * 100 * (1_000 + 8));
}
