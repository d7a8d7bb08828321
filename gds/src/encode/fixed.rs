//! Values of one width.

use arrow_array::Array;
use arrow_array::cast::AsArray;
use arrow_buffer::NullBuffer;
use arrow_schema::DataType;
use half::f16;

use super::{At, EncodeError, Encoder, Rows, Sink, null_rows, wrong_type};

impl<S: Sink> Encoder<'_, S> {
    pub(super) fn fixed(
        &mut self,
        base: u64,
        width: usize,
        at: &At<'_>,
        array: &dyn Array,
        nulls: Option<&NullBuffer>,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        if !array.data_type().equals_datatype(at.data_type) {
            return Err(wrong_type(at, array));
        }
        let data = array.to_data();
        let (start, end) = (data.offset() * width, (data.offset() + data.len()) * width);
        let values = data
            .buffers()
            .first()
            .and_then(|buffer| buffer.as_slice().get(start..end))
            .ok_or_else(|| wrong_type(at, array))?;
        match nulls {
            None => rows.put(&mut self.sink, base, width, values),
            Some(nulls) => {
                let mut values = values.to_vec();
                let null = null_value(at.data_type, width);
                for row in null_rows(nulls).set_indices() {
                    values[row * width..(row + 1) * width].copy_from_slice(&null);
                }
                rows.put(&mut self.sink, base, width, &values);
            }
        }
        Ok(())
    }

    pub(super) fn bools(
        &mut self,
        base: u64,
        at: &At<'_>,
        array: &dyn Array,
        nulls: Option<&NullBuffer>,
        rows: &Rows<'_>,
    ) -> Result<(), EncodeError> {
        let array = array
            .as_boolean_opt()
            .ok_or_else(|| wrong_type(at, array))?;
        let valid = |row: usize| nulls.is_none_or(|nulls| nulls.is_valid(row));
        let bytes: Vec<u8> = (0..array.len())
            .map(|row| u8::from(array.value(row) && valid(row)))
            .collect();
        rows.put(&mut self.sink, base, 1, &bytes);
        Ok(())
    }
}

/// The bytes of a null.
pub(super) fn null_value(data_type: &DataType, width: usize) -> Vec<u8> {
    match data_type {
        DataType::Float16 => f16::NAN.to_le_bytes().to_vec(),
        DataType::Float32 => f32::NAN.to_le_bytes().to_vec(),
        DataType::Float64 => f64::NAN.to_le_bytes().to_vec(),
        _ => vec![0; width],
    }
}
