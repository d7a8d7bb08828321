//! Bounds on what compressed buffers inflate to, found without inflating them.
//!
//! Each compressed buffer starts with its inflated length, which the decoder reserves at
//! once. ZSTD never writes past it. LZ4 does: the decoder appends until the frame ends, so
//! the frame's blocks are walked here and each is charged at the most it can hold.

use arrow_ipc::{BodyCompression, BodyCompressionMethod, CompressionType};

use super::{GateError, GateLimits};

/// Any message may inflate to this much, whatever the ratio.
const ALWAYS_ALLOWED_BYTES: u64 = 16 << 20;
/// Bytes of the inflated length that precede a compressed buffer.
const PREFIX_BYTES: usize = 8;
/// An LZ4 block expands at most this many times.
const LZ4_MAX_EXPANSION: u64 = 255;

/// What a message may still inflate to.
pub(super) struct InflationBudget {
    used_bytes: u64,
    limit_bytes: u64,
}

impl InflationBudget {
    pub(super) fn new(body_bytes: u64, limits: &GateLimits) -> InflationBudget {
        let by_ratio = body_bytes
            .saturating_mul(limits.max_inflation)
            .max(ALWAYS_ALLOWED_BYTES);
        InflationBudget {
            used_bytes: 0,
            limit_bytes: by_ratio.min(limits.max_decoded_bytes),
        }
    }

    fn charge(&mut self, bytes: u64) -> Result<(), GateError> {
        self.used_bytes = self.used_bytes.saturating_add(bytes);
        super::check_limit(
            "the decompressed message in bytes",
            self.used_bytes,
            self.limit_bytes,
        )
    }
}

/// The codec, when it is one that is read here.
pub(super) fn checked_codec(
    compression: BodyCompression<'_>,
) -> Result<CompressionType, GateError> {
    let codec = compression.codec();
    if compression.method() != BodyCompressionMethod::BUFFER
        || (codec != CompressionType::LZ4_FRAME && codec != CompressionType::ZSTD)
    {
        return Err(GateError::Unsupported {
            what: format!("compression {codec:?} ({:?})", compression.method()),
            hint: "compress each buffer with LZ4_FRAME or ZSTD, or not at all",
        });
    }
    Ok(codec)
}

/// Charges one compressed buffer to the budget.
pub(super) fn check_buffer(
    index: usize,
    bytes: &[u8],
    codec: CompressionType,
    budget: &mut InflationBudget,
) -> Result<(), GateError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let (prefix, data) = bytes.split_first_chunk::<PREFIX_BYTES>().ok_or_else(|| {
        GateError::malformed(format!(
            "compressed buffer {index} is shorter than its length prefix"
        ))
    })?;
    match i64::from_le_bytes(*prefix) {
        -1 | 0 => Ok(()),
        claimed => {
            let claimed = u64::try_from(claimed).map_err(|_| {
                GateError::malformed(format!("compressed buffer {index} claims {claimed} bytes"))
            })?;
            budget.charge(claimed)?;
            if codec == CompressionType::LZ4_FRAME {
                let bound = lz4_bound(index, data)?;
                budget.charge(bound.saturating_sub(claimed))?;
            }
            Ok(())
        }
    }
}

/// The most that an LZ4 frame can inflate to, in bytes.
fn lz4_bound(index: usize, data: &[u8]) -> Result<u64, GateError> {
    let broken = |problem: &str| {
        GateError::malformed(format!("buffer {index} is not an LZ4 frame: {problem}"))
    };
    let (magic, rest) = data
        .split_first_chunk::<4>()
        .ok_or_else(|| broken("too short"))?;
    if u32::from_le_bytes(*magic) != 0x184D_2204 {
        return Err(broken("wrong magic number"));
    }
    let &[flags, block_descriptor, ..] = rest else {
        return Err(broken("no frame descriptor"));
    };
    let block_max_bytes: u64 = match (block_descriptor >> 4) & 7 {
        4 => 64 << 10,
        5 => 256 << 10,
        6 => 1 << 20,
        7 => 4 << 20,
        _ => return Err(broken("unknown block size")),
    };
    let content_size_bytes = if flags & 0b1000 != 0 { 8 } else { 0 };
    if flags & 0b1 != 0 {
        return Err(broken("it needs a dictionary"));
    }
    let checksum_bytes = if flags & 0b1_0000 != 0 { 4 } else { 0 };
    // Flags, block descriptor, optional content size, header checksum.
    let mut blocks = rest
        .get(3 + content_size_bytes..)
        .ok_or_else(|| broken("cut header"))?;
    let mut bound = 0u64;
    loop {
        let (size, rest) = blocks
            .split_first_chunk::<4>()
            .ok_or_else(|| broken("it has no end mark"))?;
        let size = u32::from_le_bytes(*size);
        if size == 0 {
            return Ok(bound);
        }
        let length = (size & 0x7FFF_FFFF) as usize;
        bound = bound.saturating_add(if size & 0x8000_0000 != 0 {
            length as u64
        } else {
            block_max_bytes.min((length as u64).saturating_mul(LZ4_MAX_EXPANSION))
        });
        blocks = length
            .checked_add(checksum_bytes)
            .and_then(|end| rest.get(end..))
            .ok_or_else(|| broken("a block runs past its end"))?;
    }
}
