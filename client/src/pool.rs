//! Memory for received messages, used again once nobody reads it any more.
//!
//! A batch read from a server shares the memory its message was received into. When the last
//! array that uses it is dropped, the memory returns to the pool and takes the next message:
//! no allocation and no fresh page per message. Every buffer starts on a multiple of 64 bytes
//! (Arrow's own allocator sees to that), so an Arrow body in it can be read in place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use arrow_buffer::{Buffer, MutableBuffer};
use bytes::Bytes;

/// Sizes are rounded up, so that messages of nearly one size can follow each other.
const SMALL_STEP_BYTES: usize = 1 << 10;
const LARGE_STEP_BYTES: usize = 64 << 10;
/// Free buffers looked through for one that fits.
const MAX_FREE_BUFFERS: usize = 64;

/// A pool of receive buffers. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct BufferPool {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    limit_bytes: usize,
    free: Mutex<Free>,
}

#[derive(Debug, Default)]
struct Free {
    /// Oldest first.
    buffers: VecDeque<MutableBuffer>,
    bytes: usize,
}

impl BufferPool {
    /// A pool that keeps at most `limit_bytes` of free memory. Memory that is lent does not
    /// count: it is up to the reader how many batches it holds.
    pub(crate) fn new(limit_bytes: usize) -> BufferPool {
        BufferPool {
            shared: Arc::new(Shared {
                limit_bytes,
                free: Mutex::default(),
            }),
        }
    }

    /// A buffer of `length` bytes; what they hold is not defined, but zero or old. It takes at
    /// most twice its length and 64 KiB of memory, so that a small batch which is kept for long
    /// keeps no large buffer.
    pub(crate) fn take(&self, length: usize) -> PooledBuffer {
        let step = if length < LARGE_STEP_BYTES {
            SMALL_STEP_BYTES
        } else {
            LARGE_STEP_BYTES
        };
        let wanted = length.max(1).next_multiple_of(step);
        let memory = self
            .lock()
            .take(wanted, wanted.saturating_mul(2))
            .unwrap_or_else(|| MutableBuffer::from_len_zeroed(wanted));
        PooledBuffer {
            memory,
            length,
            pool: Arc::clone(&self.shared),
        }
    }

    /// Bytes that wait to be used again.
    #[cfg(test)]
    pub(crate) fn free_bytes(&self) -> usize {
        self.lock().bytes
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Free> {
        self.shared.lock()
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Free> {
        // Nothing panics while it is held; were it so, the list would still be whole.
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Free {
    /// The smallest buffer of at least `least` and at most `most` bytes.
    fn take(&mut self, least: usize, most: usize) -> Option<MutableBuffer> {
        let (index, _) = self
            .buffers
            .iter()
            .enumerate()
            .filter(|(_, buffer)| (least..=most).contains(&buffer.len()))
            .min_by_key(|(_, buffer)| buffer.len())?;
        let buffer = self.buffers.remove(index)?;
        self.bytes -= buffer.len();
        Some(buffer)
    }

    /// Keeps a buffer; the oldest make room for it.
    fn give(&mut self, buffer: MutableBuffer, limit_bytes: usize) {
        if buffer.len() > limit_bytes {
            return;
        }
        self.bytes += buffer.len();
        self.buffers.push_back(buffer);
        while self.bytes > limit_bytes || self.buffers.len() > MAX_FREE_BUFFERS {
            let Some(oldest) = self.buffers.pop_front() else {
                break;
            };
            self.bytes -= oldest.len();
        }
    }
}

/// Memory of a pool, lent for one message. Dropping it gives it back.
#[derive(Debug)]
pub(crate) struct PooledBuffer {
    memory: MutableBuffer,
    length: usize,
    pool: Arc<Shared>,
}

impl PooledBuffer {
    pub(crate) fn len(&self) -> usize {
        self.length
    }

    pub(crate) fn as_slice_mut(&mut self) -> &mut [u8] {
        &mut self.memory.as_slice_mut()[..self.length]
    }

    /// An Arrow buffer over this memory, which returns to the pool when the last user of the
    /// Arrow buffer is dropped.
    pub(crate) fn into_arrow(self) -> Buffer {
        Buffer::from(Bytes::from_owner(self))
    }
}

impl AsRef<[u8]> for PooledBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory.as_slice()[..self.length]
    }
}

impl Drop for PooledBuffer {
    fn drop(&mut self) {
        let memory = std::mem::replace(&mut self.memory, MutableBuffer::new(0));
        self.pool.lock().give(memory, self.pool.limit_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_returns_when_the_last_slice_of_it_is_dropped() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.take(100_000);
        buffer.as_slice_mut()[99_999] = 7;
        let address = buffer.as_ref().as_ptr() as usize;
        assert_eq!(address % 64, 0);
        let whole = buffer.into_arrow();
        let slice = whole.slice_with_length(99_000, 1_000);
        assert_eq!((whole.as_ptr() as usize, whole.len()), (address, 100_000));
        drop(whole);
        assert_eq!((pool.free_bytes(), slice[999]), (0, 7));
        drop(slice);
        assert_eq!(pool.free_bytes(), 128 << 10);
        let again = pool.take(110_000);
        assert_eq!(again.as_ref().as_ptr() as usize, address);
    }

    #[test]
    fn a_small_message_never_sits_in_a_large_buffer() {
        let pool = BufferPool::new(8 << 20);
        drop(pool.take(4 << 20));
        let small = pool.take(1_000);
        assert!(small.memory.len() <= 2_048, "{}", small.memory.len());
        assert_eq!(pool.free_bytes(), 4 << 20);
    }

    #[test]
    fn free_memory_is_bounded_and_the_oldest_goes_first() {
        let pool = BufferPool::new(1 << 20);
        let many: Vec<_> = (0..40).map(|_| pool.take(64 << 10)).collect();
        drop(many);
        assert_eq!(pool.free_bytes(), 1 << 20);
        let larger = pool.take(512 << 10);
        drop(larger);
        assert_eq!(pool.free_bytes(), 1 << 20);
        assert!(pool.lock().take(512 << 10, 512 << 10).is_some());
        drop(pool.take(2 << 20));
        assert_eq!(pool.free_bytes(), 512 << 10);
        let tiny: Vec<_> = (0..200).map(|_| pool.take(0)).collect();
        drop(tiny);
        assert!(pool.lock().buffers.len() <= MAX_FREE_BUFFERS);
    }
}
