//! Kernels that the library knows by name, and runs on the CPU.
//!
//! To add one: its name as in the PTX, the sizes of its parameters in order, the ranges it is
//! sure to touch (so that freeing one while the launch is queued is found out), and what it does.
//! It reaches memory only through [`Launch::read`] and [`Launch::write`], which fault like the
//! device does: error 700, for good, and a violation.

mod gather;
mod refresh;

use std::ffi::c_void;
use std::sync::Arc;

use crate::abi::items;
use crate::codes::{Answer, ILLEGAL_ADDRESS, INVALID_VALUE};
use crate::space::{Access, Segment};
use crate::state;
use crate::violations::violation;

/// A range that a launch touches.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Need {
    pub(crate) address: u64,
    pub(crate) bytes: u64,
    pub(crate) write: bool,
    /// Every byte of it is touched: false for rows that leave bytes out between them.
    pub(crate) whole: bool,
}

/// See the module.
pub(crate) struct Kernel {
    pub(crate) name: &'static str,
    /// Bytes of each parameter.
    pub(crate) params: &'static [usize],
    pub(crate) needs: fn(&Params) -> Vec<Need>,
    pub(crate) run: fn(&mut Launch) -> Answer,
}

/// All kernels.
pub(crate) const KERNELS: &[Kernel] = &[
    COPY,
    gather::kernel::<1>("pinion_gather_1"),
    gather::kernel::<2>("pinion_gather_2"),
    gather::kernel::<4>("pinion_gather_4"),
    gather::kernel::<8>("pinion_gather_8"),
    gather::kernel::<16>("pinion_gather_16"),
    gather::FOUND,
    refresh::SCATTER,
    refresh::COPY_ROWS,
];

/// For tests of the library itself.
const COPY: Kernel = Kernel {
    name: "pinion_fake_copy",
    params: &[8, 8, 8],
    needs: |params| {
        let (to, from, bytes) = (params.u64(0), params.u64(1), params.u64(2));
        let need = |address, write| Need {
            address,
            bytes,
            write,
            whole: true,
        };
        vec![need(from, false), need(to, true)]
    },
    run: |launch| {
        let (to, from, bytes) = (
            launch.params.u64(0),
            launch.params.u64(1),
            launch.params.u64(2),
        );
        let mut buffer = vec![0; bytes as usize];
        launch.read(from, &mut buffer)?;
        launch.write(to, &buffer)
    },
};

/// The parameters of a launch, as copied at the call.
#[derive(Debug)]
pub(crate) struct Params(Vec<u64>);

impl Params {
    /// Copies what the program's pointers point to: `sizes` says how much of each.
    pub(crate) fn take(pointers: *const *const c_void, sizes: &[usize]) -> Result<Params, i32> {
        let pointers = items(pointers, sizes.len());
        if pointers.len() != sizes.len() {
            return Err(INVALID_VALUE);
        }
        let values = pointers.iter().zip(sizes).map(|(pointer, size)| {
            let mut value = [0; 8];
            let bytes = items(pointer.cast::<u8>(), *size);
            value
                .get_mut(..bytes.len())
                .ok_or(INVALID_VALUE)?
                .copy_from_slice(bytes);
            Ok(u64::from_le_bytes(value))
        });
        Ok(Params(values.collect::<Result<_, i32>>()?))
    }

    /// A parameter of 8 bytes or fewer, without sign.
    pub(crate) fn u64(&self, number: usize) -> u64 {
        self.0[number]
    }
}

/// A kernel while it runs.
pub(crate) struct Launch {
    name: &'static str,
    pub(crate) params: Arc<Params>,
    /// Blocks of the grid.
    #[allow(dead_code, reason = "for kernels that divide their work by it")]
    pub(crate) grid: [u32; 3],
    /// Threads of a block.
    #[allow(dead_code, reason = "for kernels that divide their work by it")]
    pub(crate) block: [u32; 3],
    device: usize,
    /// Ranges resolved already, with the access they were resolved for.
    known: Vec<(Vec<Segment>, Access)>,
}

impl Launch {
    pub(crate) fn new(
        name: &'static str,
        params: Arc<Params>,
        grid: [u32; 3],
        block: [u32; 3],
        device: usize,
        known: Vec<(Vec<Segment>, Access)>,
    ) -> Launch {
        Launch {
            name,
            params,
            grid,
            block,
            device,
            known,
        }
    }

    /// Reads bytes of the device.
    pub(crate) fn read(&mut self, address: u64, out: &mut [u8]) -> Answer {
        let mut done = 0;
        while done < out.len() {
            let (segment, skip) = self.find(address + done as u64, Access::Read)?;
            let bytes = (segment.bytes - skip).min(out.len() - done);
            let to = &mut out[done..done + bytes];
            segment.memory.read(segment.offset + skip, to);
            done += bytes;
        }
        Ok(())
    }

    /// Writes bytes of the device.
    pub(crate) fn write(&mut self, address: u64, source: &[u8]) -> Answer {
        let mut done = 0;
        while done < source.len() {
            let (segment, skip) = self.find(address + done as u64, Access::ReadWrite)?;
            let bytes = (segment.bytes - skip).min(source.len() - done);
            let from = &source[done..done + bytes];
            segment.memory.write(segment.offset + skip, from);
            done += bytes;
        }
        Ok(())
    }

    /// Copies bytes of the device.
    pub(crate) fn copy(&mut self, from: u64, to: u64, bytes: usize) -> Answer {
        let source = self.place(from, Access::Read)?;
        let target = self.place(to, Access::ReadWrite)?;
        let (source, target) = (self.segment(source), self.segment(target));
        let (skip, at) = (
            (from - source.address) as usize,
            (to - target.address) as usize,
        );
        if skip + bytes <= source.bytes && at + bytes <= target.bytes {
            let (to, from) = (target.offset + at, source.offset + skip);
            target.memory.copy_from(to, &source.memory, from, bytes);
            return Ok(());
        }
        // It goes on in another memory.
        let mut room = vec![0; bytes];
        self.read(from, &mut room)?;
        self.write(to, &room)
    }

    /// The memory that an address is in, and how far.
    fn find(&mut self, address: u64, needed: Access) -> Result<(&Segment, usize), i32> {
        let place = self.place(address, needed)?;
        let segment = self.segment(place);
        Ok((segment, (address - segment.address) as usize))
    }

    fn segment(&self, (list, number): (usize, usize)) -> &Segment {
        &self.known[list].0[number]
    }

    /// Where among the known ranges an address is; one that is not comes to be known.
    fn place(&mut self, address: u64, needed: Access) -> Result<(usize, usize), i32> {
        if let Some(found) = self.known_at(address, needed) {
            return Ok(found);
        }
        let state = state::lock();
        let found = state
            .space
            .segment_at(address, self.device)
            .filter(|(_, access)| *access >= needed);
        let Some((whole, _)) = found else {
            violation(format!(
                "{} reaches {address:#x}: {}",
                self.name,
                state.space.explain(address)
            ));
            return Err(ILLEGAL_ADDRESS);
        };
        self.known.push((vec![whole], needed));
        Ok((self.known.len() - 1, 0))
    }

    /// Where among the known ranges an address is.
    fn known_at(&self, address: u64, needed: Access) -> Option<(usize, usize)> {
        self.known
            .iter()
            .enumerate()
            .filter(|(_, (_, access))| *access >= needed)
            .find_map(|(list, (segments, _))| {
                let number = segments.iter().position(|segment| {
                    (segment.address..segment.address + segment.bytes as u64).contains(&address)
                })?;
                Some((list, number))
            })
    }
}
