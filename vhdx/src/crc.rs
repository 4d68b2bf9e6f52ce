//! CRC-32C (Castagnoli), the checksum of headers, region tables and log entries.

/// Bytes taken in one step by the tables.
#[cfg(any(not(feature = "std"), test))]
const STEP: usize = 16;

/// The polynomial 0x1EDC6F41 with its bits reversed.
#[cfg(any(not(feature = "std"), test))]
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// `TABLES[k][b]`: what the byte `b` contributes when `k` bytes follow it in the step.
#[cfg(any(not(feature = "std"), test))]
static TABLES: [[u32; 256]; STEP] = tables();

#[cfg(any(not(feature = "std"), test))]
const fn tables() -> [[u32; 256]; STEP] {
    let mut tables = [[0; 256]; STEP];
    let mut byte = 0;
    while byte < 256 {
        let mut crc = byte as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = (crc >> 1) ^ (POLYNOMIAL & (crc & 1).wrapping_neg());
            bit += 1;
        }
        tables[0][byte] = crc;
        byte += 1;
    }
    let mut step = 1;
    while step < STEP {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[step - 1][byte];
            tables[step][byte] = (before >> 8) ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        step += 1;
    }
    tables
}

/// Continues the checksum of earlier bytes (0 for none) over `bytes`.
///
/// With the feature `std` this is the crate `crc32c`, which uses the processor's instruction; otherwise 16 bytes at a time by
/// tables, about a sixth as fast.
///
/// ```
/// assert_eq!(instar_vhdx::crc32c(0, b"123456789"), 0xe306_9283);
/// ```
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    #[cfg(feature = "std")]
    return crc32c::crc32c_append(crc, bytes);
    #[cfg(not(feature = "std"))]
    by_tables(crc, bytes)
}

#[cfg(any(not(feature = "std"), test))]
fn by_tables(crc: u32, bytes: &[u8]) -> u32 {
    let (steps, rest) = bytes.as_chunks::<STEP>();
    let crc = steps.iter().fold(!crc, |crc, step| {
        let head = crc.to_le_bytes();
        let mut next = 0;
        for (at, &byte) in step.iter().enumerate() {
            let byte = byte ^ head.get(at).copied().unwrap_or(0);
            next ^= TABLES[STEP - 1 - at][usize::from(byte)];
        }
        next
    });
    !rest.iter().fold(crc, |crc, &byte| (crc >> 8) ^ TABLES[0][((crc ^ u32::from(byte)) & 0xff) as usize])
}

/// The checksum of `bytes` with the four bytes at 4, its own field, taken as zero.
pub(crate) fn checksum(bytes: &[u8]) -> u32 {
    match bytes.split_at_checked(4).and_then(|(head, rest)| Some((head, rest.get(4..)?))) {
        Some((head, rest)) => crc32c(crc32c(crc32c(0, head), &[0; 4]), rest),
        None => crc32c(0, bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::vec::Vec;

    /// RFC 3720, B.4.
    #[test]
    fn vectors_of_the_rfc() {
        let ascending: Vec<u8> = (0..32).collect();
        let descending: Vec<u8> = (0..32).rev().collect();
        let vectors: [(&[u8], u32); 5] = [
            (&[0; 32], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&ascending, 0x46dd_794e),
            (&descending, 0x113f_db5c),
            (b"", 0),
        ];
        for (bytes, crc) in vectors {
            assert_eq!((by_tables(0, bytes), crc32c(0, bytes)), (crc, crc), "{bytes:x?}");
        }
    }

    proptest! {
        /// Against the crate that uses the processor's instruction.
        #[test]
        fn tables_agree_with_the_instruction(bytes in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..300) {
            let (head, tail) = bytes.split_at(cut.min(bytes.len()));
            prop_assert_eq!(by_tables(by_tables(0, head), tail), crc32c::crc32c(&bytes));
        }
    }

    #[test]
    fn own_field_counts_as_zero() {
        let mut bytes = [7; 20];
        let sum = checksum(&bytes);
        bytes[4..8].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(checksum(&bytes), sum);
        bytes[8] = 0;
        assert_ne!(checksum(&bytes), sum);
    }
}
