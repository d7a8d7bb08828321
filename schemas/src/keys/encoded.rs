//! Many encoded keys in one allocation.

/// Encoded keys, one after another in one buffer, addressed by their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EncodedKeys {
    bytes: Vec<u8>,
    /// Where each key ends in `bytes`; it begins where the one before ends.
    ends: Vec<usize>,
}

impl EncodedKeys {
    /// An empty list with room for `keys` keys of `bytes` bytes together.
    pub fn with_capacity(keys: usize, bytes: usize) -> EncodedKeys {
        EncodedKeys {
            bytes: Vec::with_capacity(bytes),
            ends: Vec::with_capacity(keys),
        }
    }

    pub(super) fn from_parts(bytes: Vec<u8>, ends: Vec<usize>) -> EncodedKeys {
        EncodedKeys { bytes, ends }
    }

    /// Appends a key that an encoder made.
    pub fn push(&mut self, key: &[u8]) {
        self.bytes.extend_from_slice(key);
        self.ends.push(self.bytes.len());
    }

    /// How many keys there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// True without keys.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Bytes of all keys together.
    pub fn total_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Drops all keys, keeps the room.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.ends.clear();
    }

    /// The key at `index`, from 0.
    ///
    /// # Panics
    ///
    /// As a slice does, when `index` is not below [`EncodedKeys::len`].
    #[inline]
    pub fn get(&self, index: usize) -> &[u8] {
        let start = match index {
            0 => 0,
            _ => self.ends[index - 1],
        };
        &self.bytes[start..self.ends[index]]
    }

    /// The keys in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[u8]> + '_ {
        (0..self.len()).map(|index| self.get(index))
    }
}
