//! Storing dirty bitmaps in a fresh image: spec chapter "Bitmaps".

use alloc::vec::Vec;

use instar_blockio::{self as blockio, BlockRead, BlockWrite, ErrorKind, zeroed};
use zerocopy::IntoBytes;

use crate::addr::HostOffset;
use crate::allocator::State;
use crate::error::Error;
use crate::extension::BitmapDirectory;
use crate::format::{
    BITMAP_DIRTY_TRACKING, MAX_BITMAP_BYTES, MAX_BITMAP_GRANULARITY_BITS, MAX_BITMAP_NAME, MAX_BITMAPS,
    MIN_BITMAP_GRANULARITY_BITS, RawBitmap,
};
use crate::header::Autoclear;
use crate::write::Writer;

/// Directory flag: writers must track changes in this bitmap.
const FLAG_AUTO: u32 = 2;

/// The directory of the bitmaps that were added, as far as it is known.
#[derive(Debug, Default)]
pub(crate) struct NewBitmaps {
    directory: Vec<u8>,
    count: u32,
}

impl<D: BlockWrite> Writer<D> {
    /// Adds a bitmap to a fresh image.
    ///
    /// One bit stands for 2^`granularity_bits` bytes of the disk, the low bit of a byte first. `bits` is called with
    /// ascending byte offsets in the bitmap and fills the buffer it is given. `auto`: programs that write the image
    /// shall track their changes in this bitmap.
    ///
    /// # Errors
    /// `Unsupported` in version 2 or in an image that existed before; `InvalidInput` for a name, granularity or number of bitmaps
    /// that the format does not allow; what the file or `bits` reports.
    pub fn add_bitmap(
        &mut self,
        name: &[u8],
        granularity_bits: u8,
        auto: bool,
        mut bits: impl FnMut(u64, &mut [u8]) -> blockio::Result<()>,
    ) -> Result<(), Error> {
        if self.header.version < 3 || self.state == State::Live {
            return Err(Error::Io(ErrorKind::Unsupported.into()));
        }
        let granularity = MIN_BITMAP_GRANULARITY_BITS..=MAX_BITMAP_GRANULARITY_BITS;
        let name_len = u16::try_from(name.len()).ok().filter(|len| (1..=MAX_BITMAP_NAME).contains(len));
        let bit_count = self.size().div_ceil(1 << granularity_bits.min(MAX_BITMAP_GRANULARITY_BITS));
        let Some(name_len) = name_len.filter(|_| {
            granularity.contains(&granularity_bits)
                && self.new_bitmaps.count < MAX_BITMAPS
                && bit_count.div_ceil(8) <= MAX_BITMAP_BYTES
        }) else {
            return Err(Error::Io(ErrorKind::InvalidInput.into()));
        };
        let table = self.store_bits(bit_count, &mut bits)?;
        let table_offset = self.store_clusters(table.as_bytes())?;
        let entry = RawBitmap {
            table_offset: table_offset.into(),
            table_size: (table.len() as u32).into(),
            flags: if auto { FLAG_AUTO } else { 0 }.into(),
            kind: BITMAP_DIRTY_TRACKING,
            granularity_bits,
            name_size: name_len.into(),
            extra_data_size: 0.into(),
        };
        let directory = &mut self.new_bitmaps.directory;
        directory.extend_from_slice(entry.as_bytes());
        directory.extend_from_slice(name);
        directory.resize(directory.len().next_multiple_of(8), 0);
        self.new_bitmaps.count += 1;
        Ok(())
    }

    /// Stores the clusters of bits that are not all zero; returns the bitmap table.
    fn store_bits(
        &mut self,
        bit_count: u64,
        bits: &mut dyn FnMut(u64, &mut [u8]) -> blockio::Result<()>,
    ) -> blockio::Result<Vec<zerocopy::byteorder::big_endian::U64>> {
        let cluster_size = self.header.geometry.cluster_size();
        let len = bit_count.div_ceil(8);
        let mut table = Vec::new();
        let mut at = 0;
        while at < len {
            let mut cluster = zeroed(cluster_size as usize)?;
            let part = &mut cluster[..(len - at).min(cluster_size) as usize];
            bits(at, part)?;
            if at + part.len() as u64 == len
                && !bit_count.is_multiple_of(8)
                && let Some(last) = part.last_mut()
            {
                *last &= (1 << (bit_count % 8)) - 1;
            }
            let place = if part.iter().all(|&byte| byte == 0) { 0 } else { self.store_clusters(&cluster)? };
            table.push(place.into());
            at += cluster_size;
        }
        Ok(table)
    }

    /// Writes bytes into clusters of their own.
    pub(crate) fn store_clusters(&mut self, bytes: &[u8]) -> blockio::Result<u64> {
        let geometry = self.header.geometry;
        let at = self.take_clusters(geometry.clusters(bytes.len() as u64))? * geometry.cluster_size();
        for cluster in (at..at.saturating_add(bytes.len() as u64)).step_by(geometry.cluster_size() as usize) {
            self.forget_side(cluster);
        }
        self.main.write(at, bytes)?;
        Ok(at)
    }

    /// Stores the directory of the bitmaps that were added and names it in the header extension.
    pub(crate) fn store_bitmap_directory(&mut self) -> blockio::Result<()> {
        let new = core::mem::take(&mut self.new_bitmaps);
        if new.count == 0 {
            return Ok(());
        }
        let offset = HostOffset(self.store_clusters(&new.directory)?);
        self.extensions.bitmaps = Some(BitmapDirectory { offset, len: new.directory.len() as u64, count: new.count });
        self.header.autoclear |= Autoclear::BITMAPS;
        Ok(())
    }
}
