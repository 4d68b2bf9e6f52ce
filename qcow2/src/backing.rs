//! Another backing file for an existing image.

use instar_blockio::BlockWrite;

use crate::error::{Error, Result};
use crate::format::{MAX_BACKING_FORMAT, MAX_BACKING_NAME};
use crate::header::Autoclear;
use crate::write::Writer;

impl<D: BlockWrite> Writer<D> {
    /// Records the name and the format of the backing file; empty ones for none. Durable afterwards.
    ///
    /// What the image leaves to its backing image is answered by the new one from then on: it is the caller's to have written
    /// whatever they differ in.
    ///
    /// # Errors
    /// [`Error::BackingRefused`] and [`Error::HeaderFull`], after which nothing has changed; what the file reports.
    pub fn set_backing(&mut self, name: &[u8], format: &[u8]) -> Result<()> {
        let raw_data = self.header.autoclear.contains(Autoclear::DATA_FILE_RAW);
        let too_long = name.len() > MAX_BACKING_NAME as usize || format.len() > MAX_BACKING_FORMAT as usize;
        if !name.is_empty() && raw_data || too_long {
            return Err(Error::BackingRefused);
        }
        self.flush()?;
        self.begin_metadata()?;
        let old_name = core::mem::replace(&mut self.backing_name, name.to_vec());
        let new_format = Some(format.to_vec()).filter(|format| !format.is_empty());
        let old_format = core::mem::replace(&mut self.extensions.backing_format, new_format);
        match self.rewrite_header() {
            Ok(()) => Ok(self.flush()?),
            Err(error) => {
                self.backing_name = old_name;
                self.extensions.backing_format = old_format;
                match error {
                    Error::HeaderTooLong(_) => Err(Error::HeaderFull),
                    other => Err(other),
                }
            }
        }
    }

    /// The name of the backing file as recorded, empty if there is none.
    pub fn backing_name(&self) -> &[u8] {
        &self.backing_name
    }
}
