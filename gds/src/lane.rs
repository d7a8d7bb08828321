//! One thread's way to and from a device: a stream, and blocks that take turns on it.

use std::collections::VecDeque;

use crate::device::{Device, DeviceRange, WorkStream};
use crate::error::GdsError;
use crate::pool::{PinnedBlock, PinnedPool, Stretch, Transfer};

/// Blocks of one lane: one is filled while the other is copied.
pub(crate) const BLOCKS: usize = 2;

/// See the module. Copies are done in the order they were sent.
#[derive(Debug)]
pub(crate) struct Lane {
    stream: WorkStream,
    pool: PinnedPool,
    block_bytes: usize,
    sent: VecDeque<Transfer>,
}

impl Lane {
    /// Blocks are of `block_bytes` bytes.
    pub(crate) fn new(
        device: &Device,
        pool: &PinnedPool,
        block_bytes: usize,
    ) -> Result<Lane, GdsError> {
        Ok(Lane {
            stream: device.stream()?,
            pool: pool.clone(),
            block_bytes,
            sent: VecDeque::new(),
        })
    }

    /// Bytes of each block.
    pub(crate) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    /// Where its copies are queued.
    pub(crate) fn stream(&self) -> &WorkStream {
        &self.stream
    }

    /// A block to fill: a new one, or the oldest of this lane once its copy is done.
    pub(crate) fn block(&mut self) -> Result<PinnedBlock, GdsError> {
        if self.sent.len() < BLOCKS {
            // Waiting for others while one's own blocks are out could be for ever.
            let block = match self.sent.is_empty() {
                true => Some(self.pool.take(self.block_bytes)?),
                false => self.pool.try_take(self.block_bytes)?,
            };
            if let Some(block) = block {
                return Ok(block);
            }
        }
        match self.sent.pop_front() {
            Some(oldest) => oldest.wait(),
            None => self.pool.take(self.block_bytes),
        }
    }

    /// Starts copying stretches of a block to the device.
    pub(crate) fn send(
        &mut self,
        block: PinnedBlock,
        stretches: &[Stretch],
        to: &DeviceRange,
    ) -> Result<(), GdsError> {
        let transfer = block.copy_to(stretches, to, &self.stream)?;
        self.sent.push_back(transfer);
        Ok(())
    }

    /// Brings a stretch of the device into `out`.
    pub(crate) fn fetch(
        &mut self,
        from: &DeviceRange,
        offset: u64,
        out: &mut [u8],
    ) -> Result<(), GdsError> {
        for (n, part) in out.chunks_mut(self.block_bytes).enumerate() {
            let stretch = Stretch {
                host_offset: 0,
                device_offset: offset + (n * self.block_bytes) as u64,
                bytes: part.len(),
            };
            let block = self.block()?;
            let block = block.copy_from(&[stretch], from, &self.stream)?.wait()?;
            part.copy_from_slice(&block[..part.len()]);
        }
        Ok(())
    }

    /// Waits for all copies: the first error of any.
    pub(crate) fn finish(mut self) -> Result<(), GdsError> {
        let mut result = Ok(());
        for transfer in self.sent.drain(..) {
            result = result.and(transfer.wait().map(drop));
        }
        result
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // Of a call that failed: nothing of it may still run when it returns. A wait that fails
        // too has already given up what it was for.
        for transfer in self.sent.drain(..) {
            let _ = transfer.wait();
        }
    }
}
