//! The wire format of Protobuf: fields with their numbers, every length checked.

/// A value as it stands on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Raw {
    /// Wire types 0, 1 and 5.
    Number(u64),
    /// Wire type 2: where the bytes are in the record.
    Range { start: usize, end: usize },
}

/// A field of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WireField {
    pub(crate) number: u32,
    pub(crate) wire_type: u8,
    pub(crate) value: Raw,
}

/// Deepest nesting of groups that are skipped.
const MAX_GROUPS: usize = 32;

/// Reads the fields of a message that stands at a place in a record.
pub(crate) struct Wire<'r> {
    record: &'r [u8],
    at: usize,
    end: usize,
}

impl<'r> Wire<'r> {
    /// The bytes `start..end` of the record; those outside it are cut off.
    pub(crate) fn new(record: &'r [u8], start: usize, end: usize) -> Wire<'r> {
        let end = end.min(record.len());
        Wire {
            record,
            at: start.min(end),
            end,
        }
    }

    /// True when nothing is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.at >= self.end
    }

    /// The next field; `None` at the end. Groups are skipped.
    ///
    /// # Errors
    ///
    /// What is broken.
    pub(crate) fn next_field(&mut self) -> Result<Option<WireField>, String> {
        let mut groups: Vec<u32> = Vec::new();
        while !self.is_empty() {
            let tag = self.varint()?;
            let number = u32::try_from(tag >> 3)
                .ok()
                .filter(|number| (1..=536_870_911).contains(number))
                .ok_or_else(|| format!("broken Protobuf: {} is no field number", tag >> 3))?;
            let wire_type = (tag & 7) as u8;
            let value = match wire_type {
                0 => Raw::Number(self.varint()?),
                1 => Raw::Number(self.fixed::<8>().map(u64::from_le_bytes)?),
                5 => Raw::Number(u64::from(self.fixed::<4>().map(u32::from_le_bytes)?)),
                2 => self.range()?,
                3 => {
                    if groups.len() >= MAX_GROUPS {
                        return Err("broken Protobuf: groups nest too deep".to_owned());
                    }
                    groups.push(number);
                    continue;
                }
                4 => match groups.pop() {
                    Some(open) if open == number => continue,
                    _ => return Err("broken Protobuf: a group ends that is not open".to_owned()),
                },
                other => return Err(format!("broken Protobuf: unknown wire type {other}")),
            };
            if groups.is_empty() {
                return Ok(Some(WireField {
                    number,
                    wire_type,
                    value,
                }));
            }
        }
        if groups.is_empty() {
            Ok(None)
        } else {
            Err("broken Protobuf: a group does not end".to_owned())
        }
    }

    /// The next value of a packed list.
    ///
    /// # Errors
    ///
    /// What is broken.
    pub(crate) fn packed(&mut self, wire_type: u8) -> Result<u64, String> {
        match wire_type {
            1 => self.fixed::<8>().map(u64::from_le_bytes),
            5 => self.fixed::<4>().map(u32::from_le_bytes).map(u64::from),
            _ => self.varint(),
        }
    }

    fn varint(&mut self) -> Result<u64, String> {
        let bytes = self.record.get(self.at..self.end).unwrap_or_default();
        let mut number = 0_u64;
        for (i, byte) in bytes.iter().take(10).enumerate() {
            // The tenth byte holds one bit more.
            if i == 9 && *byte > 1 {
                break;
            }
            number |= u64::from(byte & 0x7F) << (7 * i);
            if byte & 0x80 == 0 {
                self.at += i + 1;
                return Ok(number);
            }
        }
        Err(if bytes.len() < 10 {
            cut()
        } else {
            "broken Protobuf: a varint of more than 64 bits".to_owned()
        })
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self
            .record
            .get(self.at..self.end)
            .and_then(|rest| rest.first_chunk::<N>())
            .ok_or_else(cut)?;
        self.at += N;
        Ok(*bytes)
    }

    fn range(&mut self) -> Result<Raw, String> {
        let length = self.varint()?;
        let start = self.at;
        let end = usize::try_from(length)
            .ok()
            .and_then(|length| start.checked_add(length))
            .filter(|end| *end <= self.end)
            .ok_or_else(cut)?;
        self.at = end;
        Ok(Raw::Range { start, end })
    }
}

fn cut() -> String {
    "broken Protobuf: the record is cut short".to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(bytes: &[u8]) -> Result<Vec<WireField>, String> {
        let mut wire = Wire::new(bytes, 0, bytes.len());
        let mut fields = Vec::new();
        while let Some(field) = wire.next_field()? {
            fields.push(field);
        }
        Ok(fields)
    }

    #[test]
    fn every_wire_type_is_read_and_groups_are_skipped() {
        let bytes = [
            0x08, 0x96, 0x01, // 1: varint 150
            0x11, 1, 0, 0, 0, 0, 0, 0, 0, // 2: fixed64
            0x1D, 2, 0, 0, 0, // 3: fixed32
            0x23, 0x08, 0x01, 0x2B, 0x2C, 0x24, // group 4 with a field and group 5
            0x32, 2, b'h', b'i', // 6: bytes
        ];
        let read: Vec<(u32, Raw)> = fields(&bytes)
            .expect("fields")
            .into_iter()
            .map(|field| (field.number, field.value))
            .collect();
        assert_eq!(
            read,
            [
                (1, Raw::Number(150)),
                (2, Raw::Number(1)),
                (3, Raw::Number(2)),
                (6, Raw::Range { start: 25, end: 27 }),
            ]
        );
    }

    #[test]
    fn broken_bytes_are_named_and_nothing_is_read_past_the_end() {
        for (bytes, words) in [
            (&[0x08][..], "cut short"),
            (&[0x32, 5, 1], "cut short"),
            (&[0x11, 1, 2], "cut short"),
            (
                &[
                    0x32, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 1,
                ],
                "cut short",
            ),
            (&[0x00, 0x01], "no field number"),
            (&[0x0E], "unknown wire type 6"),
            (&[0x23], "does not end"),
            (&[0x24], "not open"),
            (
                &[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1],
                "64 bits",
            ),
        ] {
            let problem = fields(bytes).expect_err("broken");
            assert!(problem.contains(words), "{bytes:?}: {problem}");
        }
        assert!(fields(&[0x23; 64]).expect_err("deep").contains("too deep"));
    }
}
