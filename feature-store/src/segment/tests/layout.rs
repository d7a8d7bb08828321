//! Where bytes lie: in the file, in memory, and beside one another.

use arrow_array::Array;
use arrow_data::ArrayData;

use super::*;

fn all_buffers(data: &ArrayData, found: &mut Vec<(usize, usize)>) {
    found.extend(
        data.buffers()
            .iter()
            .map(|buffer| (buffer.as_ptr() as usize, buffer.len())),
    );
    found.extend(data.nulls().map(|nulls| {
        let buffer = nulls.buffer();
        (buffer.as_ptr() as usize, buffer.len())
    }));
    for child in data.child_data() {
        all_buffers(child, found);
    }
}

fn wide_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("id", DataType::Int64, false),
        Field::new("f1", DataType::Float32, true),
        Field::new("a", DataType::Float64, true),
        Field::new("name", DataType::Utf8View, true),
        Field::new("f2", DataType::Float32, true),
        Field::new("b", DataType::Float64, true),
    ]))
}

fn wide(rows: i64) -> RecordBatch {
    let floats = |null_every: i64| -> ArrayRef {
        Arc::new(arrow_array::Float32Array::from_iter(
            (0..rows).map(|row| (row % null_every != 1).then_some(row as f32)),
        ))
    };
    let doubles = || -> ArrayRef {
        Arc::new(Float64Array::from_iter_values(
            (0..rows).map(|row| row as f64),
        ))
    };
    let names = arrow_array::StringViewArray::from_iter_values(
        (0..rows).map(|row| format!("the name of row {row}")),
    );
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter_values(0..rows)),
        floats(10),
        doubles(),
        Arc::new(names),
        floats(1000),
        doubles(),
    ];
    RecordBatch::try_new(wide_schema(), columns).unwrap()
}

#[test]
fn large_buffers_are_page_aligned_in_memory_and_point_into_the_map() {
    let fixture = Fixture::new(wide_schema(), 1);
    let segment = fixture.open(&fixture.write(&[wide(50_000)]));
    let map = segment.arrow_map();
    let map_range = map.as_ptr() as usize..map.as_ptr() as usize + map.len();
    for batch in 0..segment.batches() {
        let mut buffers = Vec::new();
        for column in segment.batch(batch).unwrap().columns() {
            all_buffers(&column.to_data(), &mut buffers);
        }
        for (address, bytes) in buffers {
            let alignment = if bytes >= PAGE_BYTES {
                PAGE_BYTES
            } else {
                SMALL_ALIGNMENT_BYTES
            };
            assert_eq!(address % alignment, 0, "a buffer of {bytes} bytes");
            assert!(map_range.contains(&address), "copied");
        }
        let (offset, bytes) = segment.body_range(batch).unwrap();
        assert_eq!(offset % PAGE_BYTES as u64, 0);
        assert_eq!(bytes % PAGE_BYTES, 0);
    }
}

#[test]
fn equal_widths_lie_at_the_pitch_that_the_footer_names() {
    let fixture = Fixture::new(wide_schema(), 1);
    let segment = fixture.open(&fixture.write(&[wide(40_000)]));
    let values = |batch: &RecordBatch, column: usize| {
        batch.column(column).to_data().buffers()[0].as_ptr() as usize
    };
    let pitch = |rows: usize, width: usize| (rows * width).next_multiple_of(PAGE_BYTES);
    for number in 0..segment.batches() {
        let batch = segment.batch(number).unwrap();
        let rows = batch.num_rows();
        let (offset, _) = segment.body_range(number).unwrap();
        let body = segment.arrow_map().as_ptr() as usize + offset as usize;
        assert_eq!(values(&batch, 0), body);
        assert_eq!(values(&batch, 2), body + pitch(rows, 8));
        assert_eq!(values(&batch, 5), body + 2 * pitch(rows, 8));
        let floats = body + 3 * pitch(rows, 8);
        assert_eq!(values(&batch, 1), floats);
        assert_eq!(values(&batch, 4), floats + pitch(rows, 4));
    }

    let path = fixture.dir.path().join("0000000000000007.arrow");
    let reader =
        arrow_ipc::reader::FileReader::try_new(std::fs::File::open(path).unwrap(), None).unwrap();
    let metadata = reader.custom_metadata();
    assert_eq!(metadata["pinion.format"], "1");
    assert_eq!(
        metadata["pinion.batch_rows"],
        segment.batch_rows().to_string()
    );
    let groups: serde_json::Value = serde_json::from_str(&metadata["pinion.groups"]).unwrap();
    let rows = segment.batch_rows();
    assert_eq!(
        groups,
        serde_json::json!([
            {"width_bytes": 8, "pitch_bytes": pitch(rows, 8), "columns": ["id", "a", "b"]},
            {"width_bytes": 4, "pitch_bytes": pitch(rows, 4), "columns": ["f1", "f2"]},
        ])
    );
}

#[test]
fn bodies_stay_below_the_limit_and_batches_are_powers_of_two() {
    let fixture = Fixture::new(wide_schema(), 1);
    let segment = fixture.open(&fixture.write(&[wide(200_000)]));
    assert!(segment.batch_rows().is_power_of_two());
    assert!(segment.batches() > 1);
    for batch in 0..segment.batches() {
        let block = segment.block(batch).unwrap();
        assert!(block.body_bytes <= fixture.options.max_body_bytes);
        // Not twice as small as it could be.
        if batch + 1 < segment.batches() {
            assert!(block.body_bytes * 5 / 2 > fixture.options.max_body_bytes);
            assert_eq!(
                segment.batch(batch).unwrap().num_rows(),
                segment.batch_rows()
            );
        }
    }
}

#[test]
fn blocks_are_flight_messages() {
    let fixture = Fixture::new(user_schema(), 1);
    let segment = fixture.open(&fixture.write(&[users(0..10)]));
    let block = segment.block(0).unwrap();
    let map = segment.arrow_map();
    let prefix = &map[block.offset as usize..block.offset as usize + 8];
    assert_eq!(prefix[..4], [0xff; 4]);
    let header_bytes = u32::from_le_bytes(prefix[4..].try_into().unwrap()) as usize;
    assert_eq!(header_bytes + 8, block.metadata_bytes);
    let header = &map[block.offset as usize + 8..][..header_bytes];
    let message = arrow_ipc::root_as_message(header).unwrap();
    assert_eq!(message.bodyLength() as usize, block.body_bytes);
}

#[test]
fn what_is_fetched_for_a_column_is_where_its_buffers_lie() {
    let rows = super::types::every_type(500);
    let fixture = Fixture::new(rows.schema(), 1);
    let segment = fixture.open(&fixture.write(&[rows]));
    let file = &segment.rows.file;
    let block = file.block(0).unwrap();
    let start = file.map().bytes().as_ptr() as usize;
    for column in 0..segment.schema().fields().len() {
        let fetched = file.column_ranges(&block, &[column]);
        let mut found = Vec::new();
        let decoded = segment.batch_columns(0, &[column]).unwrap();
        all_buffers(&decoded.column(0).to_data(), &mut found);
        found.retain(|(at, bytes)| {
            *bytes > 0
                && file
                    .map()
                    .bytes()
                    .as_ptr_range()
                    .contains(&(*at as *const u8))
        });
        let name = segment.schema().field(column).name();
        for (at, bytes) in &found {
            let (from, to) = (at - start, at - start + bytes);
            let holds = fetched
                .iter()
                .any(|range| range.start <= from && to <= range.end);
            assert!(holds, "{name}: {from}..{to} is not in {fetched:?}");
        }
        assert_eq!(fetched.len(), found.len(), "{name}");
    }
}
