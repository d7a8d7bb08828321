//! Copies and fills.
//!
//! Which side of a copy is what, as in the driver: a range of the device, page-locked host memory
//! (read or written when the stream comes to it), or pageable host memory (a source is staged at
//! the call; a destination makes the call wait). What waits for what follows NVIDIA's page "API
//! synchronization behavior".

use std::sync::Arc;

use crate::abi::Copy2d;
use crate::codes::{Answer, INVALID_VALUE, OUT_OF_MEMORY};
use crate::gate::{Here, here, in_context};
use crate::space::{Access, Segment, Touch, hex};
use crate::state::{self, State};
use crate::streams::{self, Work};
use crate::sys::Memory;
use crate::violations::violation;

/// One side of a copy.
#[derive(Debug, Clone, Copy)]
enum Side {
    Host(u64),
    Device(u64),
    /// Whichever the address says.
    Either(u64),
}

/// The memory of one side, and whether the program may touch it after the call.
struct Place {
    segments: Vec<Segment>,
    pageable: bool,
}

impl Place {
    /// Takes a copy of the program's bytes, and goes on with that.
    fn stage(&mut self) -> Answer {
        for segment in &mut self.segments {
            let staged = Memory::staged(segment.address, segment.bytes);
            segment.memory = Arc::new(staged.map_err(|_| OUT_OF_MEMORY)?);
            segment.address = segment.memory.address();
        }
        Ok(())
    }
}

/// A copy of rows; one row for a plain copy.
#[derive(Debug, Clone, Copy)]
struct Shape {
    row_bytes: usize,
    rows: usize,
    from_pitch: usize,
    to_pitch: usize,
}

impl Shape {
    fn plain(bytes: usize) -> Shape {
        Shape {
            row_bytes: bytes,
            rows: 1,
            from_pitch: bytes,
            to_pitch: bytes,
        }
    }

    fn span(&self, pitch: usize) -> Result<usize, i32> {
        let before_last = pitch.checked_mul(self.rows - 1).ok_or(INVALID_VALUE)?;
        before_last.checked_add(self.row_bytes).ok_or(INVALID_VALUE)
    }

    fn is_empty(&self) -> bool {
        self.row_bytes == 0 || self.rows == 0
    }
}

/// When the call returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Return {
    Queued,
    Done,
}

fn host_place(state: &State, call: &str, address: u64, bytes: usize) -> Result<Place, i32> {
    let range = address..address.checked_add(bytes as u64).ok_or(INVALID_VALUE)?;
    if address == 0 {
        return Err(INVALID_VALUE);
    }
    if state.space.is_of_device(address) {
        violation(format!(
            "{call} takes {} of the device for host memory",
            hex(&range)
        ));
        return Err(INVALID_VALUE);
    }
    if state.space.is_quarantined(&range) {
        violation(format!(
            "{call} touches {}, which cuMemFreeHost gave back",
            hex(&range)
        ));
        return Err(INVALID_VALUE);
    }
    let Some((start, pinned)) = state.space.pinned_in(&range) else {
        let memory = Arc::new(Memory::of_program(address, bytes));
        return Ok(Place {
            segments: vec![Segment {
                memory,
                offset: 0,
                bytes,
                address,
            }],
            pageable: true,
        });
    };
    if start > address || start + pinned.bytes < range.end {
        // Part of it page-locked, part not.
        return Err(INVALID_VALUE);
    }
    let segment = Segment {
        memory: Arc::clone(&pinned.memory),
        offset: (address - start) as usize,
        bytes,
        address,
    };
    Ok(Place {
        segments: vec![segment],
        pageable: false,
    })
}

fn place(
    state: &State,
    call: &str,
    here: Here,
    side: Side,
    bytes: usize,
    needed: Access,
) -> Result<Place, i32> {
    match side {
        Side::Host(address) => host_place(state, call, address, bytes),
        Side::Either(address) if !state.space.is_of_device(address) => {
            host_place(state, call, address, bytes)
        }
        Side::Device(address) | Side::Either(address) => {
            let end = address.checked_add(bytes as u64).ok_or(INVALID_VALUE)?;
            let segments = state
                .space
                .resolve(call, address..end, here.device, needed)?;
            Ok(Place {
                segments,
                pageable: false,
            })
        }
    }
}

/// A stretch of segments that follow each other.
fn part(segments: &[Segment], offset: usize, bytes: usize) -> Vec<Segment> {
    let (mut skip, mut left) = (offset, bytes);
    let mut parts = Vec::new();
    for segment in segments {
        if skip >= segment.bytes {
            skip -= segment.bytes;
            continue;
        }
        let mut found = segment.clone();
        found.offset += skip;
        found.address += skip as u64;
        found.bytes = (found.bytes - skip).min(left);
        left -= found.bytes;
        skip = 0;
        parts.push(found);
        if left == 0 {
            break;
        }
    }
    parts
}

/// Copies between two lists of segments of the same length.
fn copy_segments(from: &[Segment], to: &[Segment]) {
    let (mut sources, mut done) = (from.iter(), 0);
    let mut source = sources.next();
    for target in to {
        let mut filled = 0;
        while filled < target.bytes {
            let Some(current) = source else { return };
            let bytes = (target.bytes - filled).min(current.bytes - done);
            target.memory.copy_from(
                target.offset + filled,
                &current.memory,
                current.offset + done,
                bytes,
            );
            filled += bytes;
            done += bytes;
            if done == current.bytes {
                source = sources.next();
                done = 0;
            }
        }
    }
}

fn touches(place: &Place, shape: Shape, pitch: usize, write: bool) -> Vec<Touch> {
    let touches = Touch::of(&place.segments, write);
    if shape.rows > 1 && shape.row_bytes < pitch {
        Touch::loosely(touches)
    } else {
        touches
    }
}

/// Any copy. See the module for when it returns.
fn copy(
    call: &'static str,
    mine: Here,
    stream: u64,
    from: Side,
    to: Side,
    shape: Shape,
    returns: Return,
) -> Answer {
    if shape.is_empty() {
        return Ok(());
    }
    let (from_span, to_span) = (shape.span(shape.from_pitch)?, shape.span(shape.to_pitch)?);
    let mut state = state::lock();
    let stream = streams::find(&mut state, call, mine, stream)?;
    let mut source = place(&state, call, mine, from, from_span, Access::Read)?;
    let mut target = place(&state, call, mine, to, to_span, Access::ReadWrite)?;
    if source.pageable && !target.pageable {
        if returns == Return::Done {
            // "A stream sync is performed before the copy is initiated."
            let last = streams::last(&state, stream);
            drop(streams::wait_for(state, stream, last));
        } else {
            drop(state);
        }
        source.stage()?;
        state = state::lock();
        // What was there before the lock was given up may be gone.
        target = place(&state, call, mine, to, to_span, Access::ReadWrite)?;
    }
    let mut touched = touches(&source, shape, shape.from_pitch, false);
    touched.extend(touches(&target, shape, shape.to_pitch, true));
    let waits = match returns {
        Return::Queued => target.pageable,
        // The DMA of a staged source may end after the return, and a copy inside the device does.
        Return::Done => {
            target.pageable || !is_between_device(&state, &source, &target) && !source.pageable
        }
    };
    let (source, target) = (source.segments, target.segments);
    let work = Work::Run(Box::new(move || {
        for row in 0..shape.rows {
            let from = part(&source, row * shape.from_pitch, shape.row_bytes);
            let to = part(&target, row * shape.to_pitch, shape.row_bytes);
            copy_segments(&from, &to);
        }
        Ok(())
    }));
    let number = streams::submit(&mut state, stream, call, touched, work);
    if waits {
        drop(streams::wait_for(state, stream, number));
        here()?;
    }
    Ok(())
}

fn is_between_device(state: &State, source: &Place, target: &Place) -> bool {
    let of_device = |place: &Place| state.space.is_of_device(place.segments[0].address);
    of_device(source) && of_device(target)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoD_v2(to: u64, from: u64, bytes: usize) -> i32 {
    in_context("cuMemcpyHtoD", |here| {
        copy(
            "cuMemcpyHtoD",
            here,
            0,
            Side::Host(from),
            Side::Device(to),
            Shape::plain(bytes),
            Return::Done,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> i32 {
    in_context("cuMemcpyHtoDAsync", |here| {
        copy(
            "cuMemcpyHtoDAsync",
            here,
            stream,
            Side::Host(from),
            Side::Device(to),
            Shape::plain(bytes),
            Return::Queued,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoH_v2(to: u64, from: u64, bytes: usize) -> i32 {
    in_context("cuMemcpyDtoH", |here| {
        copy(
            "cuMemcpyDtoH",
            here,
            0,
            Side::Device(from),
            Side::Host(to),
            Shape::plain(bytes),
            Return::Done,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> i32 {
    in_context("cuMemcpyDtoHAsync", |here| {
        copy(
            "cuMemcpyDtoHAsync",
            here,
            stream,
            Side::Device(from),
            Side::Host(to),
            Shape::plain(bytes),
            Return::Queued,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoD_v2(to: u64, from: u64, bytes: usize) -> i32 {
    in_context("cuMemcpyDtoD", |here| {
        copy(
            "cuMemcpyDtoD",
            here,
            0,
            Side::Device(from),
            Side::Device(to),
            Shape::plain(bytes),
            Return::Done,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) -> i32 {
    in_context("cuMemcpyDtoDAsync", |here| {
        copy(
            "cuMemcpyDtoDAsync",
            here,
            stream,
            Side::Device(from),
            Side::Device(to),
            Shape::plain(bytes),
            Return::Queued,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy(to: u64, from: u64, bytes: usize) -> i32 {
    in_context("cuMemcpy", |here| {
        copy(
            "cuMemcpy",
            here,
            0,
            Side::Either(from),
            Side::Either(to),
            Shape::plain(bytes),
            Return::Done,
        )
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyAsync(to: u64, from: u64, bytes: usize, stream: u64) -> i32 {
    in_context("cuMemcpyAsync", |here| {
        copy(
            "cuMemcpyAsync",
            here,
            stream,
            Side::Either(from),
            Side::Either(to),
            Shape::plain(bytes),
            Return::Queued,
        )
    })
}

fn side_2d(kind: u32, host: u64, device: u64, offset: usize) -> Result<Side, i32> {
    match kind {
        1 => Ok(Side::Host(host + offset as u64)),
        2 => Ok(Side::Device(device + offset as u64)),
        4 => Ok(Side::Either(device + offset as u64)),
        _ => Err(INVALID_VALUE),
    }
}

fn copy_2d(
    call: &'static str,
    here: Here,
    stream: u64,
    what: Option<&Copy2d>,
    returns: Return,
) -> Answer {
    let what = what.ok_or(INVALID_VALUE)?;
    let pitch = |pitch: usize, x: usize| {
        let needed = x.checked_add(what.width_bytes).ok_or(INVALID_VALUE)?;
        let pitch = if pitch == 0 { needed } else { pitch };
        if pitch < needed {
            Err(INVALID_VALUE)
        } else {
            Ok(pitch)
        }
    };
    let from_pitch = pitch(what.src_pitch, what.src_x_bytes)?;
    let to_pitch = pitch(what.dst_pitch, what.dst_x_bytes)?;
    let offset = |pitch: usize, y: usize, x: usize| {
        pitch
            .checked_mul(y)
            .and_then(|rows| rows.checked_add(x))
            .ok_or(INVALID_VALUE)
    };
    let from = side_2d(
        what.src_kind,
        what.src_host,
        what.src_device,
        offset(from_pitch, what.src_y, what.src_x_bytes)?,
    )?;
    let to = side_2d(
        what.dst_kind,
        what.dst_host,
        what.dst_device,
        offset(to_pitch, what.dst_y, what.dst_x_bytes)?,
    )?;
    let shape = Shape {
        row_bytes: what.width_bytes,
        rows: what.height,
        from_pitch,
        to_pitch,
    };
    copy(call, here, stream, from, to, shape, returns)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2D_v2(what: Option<&Copy2d>) -> i32 {
    in_context("cuMemcpy2D", |here| {
        copy_2d("cuMemcpy2D", here, 0, what, Return::Done)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2DUnaligned_v2(what: Option<&Copy2d>) -> i32 {
    in_context("cuMemcpy2DUnaligned", |here| {
        copy_2d("cuMemcpy2DUnaligned", here, 0, what, Return::Done)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpy2DAsync_v2(what: Option<&Copy2d>, stream: u64) -> i32 {
    in_context("cuMemcpy2DAsync", |here| {
        copy_2d("cuMemcpy2DAsync", here, stream, what, Return::Queued)
    })
}

/// Fills with a pattern. Queued in any case: "memset functions are asynchronous with respect to
/// the host".
fn fill(
    call: &'static str,
    here: Here,
    stream: u64,
    to: u64,
    pattern: &[u8],
    items: usize,
) -> Answer {
    let bytes = items.checked_mul(pattern.len()).ok_or(INVALID_VALUE)?;
    if !to.is_multiple_of(pattern.len() as u64) {
        return Err(INVALID_VALUE);
    }
    if bytes == 0 {
        return Ok(());
    }
    let mut state = state::lock();
    let stream = streams::find(&mut state, call, here, stream)?;
    let end = to.checked_add(bytes as u64).ok_or(INVALID_VALUE)?;
    let segments = state
        .space
        .resolve(call, to..end, here.device, Access::ReadWrite)?;
    let touched = Touch::of(&segments, true);
    let pattern = pattern.to_vec();
    let work = Work::Run(Box::new(move || {
        for segment in &segments {
            segment.memory.fill(segment.offset, segment.bytes, &pattern);
        }
        Ok(())
    }));
    streams::submit(&mut state, stream, call, touched, work);
    Ok(())
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8_v2(to: u64, value: u8, count: usize) -> i32 {
    in_context("cuMemsetD8", |here| {
        fill("cuMemsetD8", here, 0, to, &[value], count)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: u8, count: usize, stream: u64) -> i32 {
    in_context("cuMemsetD8Async", |here| {
        fill("cuMemsetD8Async", here, stream, to, &[value], count)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32_v2(to: u64, value: u32, count: usize) -> i32 {
    in_context("cuMemsetD32", |here| {
        fill("cuMemsetD32", here, 0, to, &value.to_le_bytes(), count)
    })
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD32Async(to: u64, value: u32, count: usize, stream: u64) -> i32 {
    in_context("cuMemsetD32Async", |here| {
        fill(
            "cuMemsetD32Async",
            here,
            stream,
            to,
            &value.to_le_bytes(),
            count,
        )
    })
}
