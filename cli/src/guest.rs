//! The guest programs, made by `build.rs` and embedded here.

/// A program that runs in the sandbox.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// The ELF file.
    pub program: &'static [u8],
    /// Its functions: one line each, by ascending address, of a hexadecimal address, a blank and the name.
    map: &'static str,
}

/// Describes images.
pub static INFO: Guest =
    Guest { program: include_bytes!(env!("INSTAR_GUEST_INFO")), map: include_str!(env!("INSTAR_GUEST_INFO_MAP")) };

/// Copies images.
pub static CONVERT: Guest = Guest {
    program: include_bytes!(env!("INSTAR_GUEST_CONVERT")),
    map: include_str!(env!("INSTAR_GUEST_CONVERT_MAP")),
};

/// Makes empty images.
pub static CREATE: Guest =
    Guest { program: include_bytes!(env!("INSTAR_GUEST_CREATE")), map: include_str!(env!("INSTAR_GUEST_CREATE_MAP")) };

/// Answers questions about images.
pub static QUERY: Guest =
    Guest { program: include_bytes!(env!("INSTAR_GUEST_QUERY")), map: include_str!(env!("INSTAR_GUEST_QUERY_MAP")) };

/// Changes images in place.
pub static EDIT: Guest =
    Guest { program: include_bytes!(env!("INSTAR_GUEST_EDIT")), map: include_str!(env!("INSTAR_GUEST_EDIT_MAP")) };

/// The programs' names and SHA-256 sums: the same wherever this version is built by the same compiler.
pub fn hashes() -> impl Iterator<Item = (&'static str, &'static str)> {
    env!("INSTAR_GUEST_HASHES").split(',').filter_map(|entry| entry.split_once(' '))
}

impl Guest {
    /// Name of the function at an address, and the distance from its start; `None` in front of the first.
    pub fn function_at(&self, address: u64) -> Option<(&'static str, u64)> {
        let entries = self.map.lines().filter_map(|line| {
            let (start, name) = line.split_once(' ')?;
            Some((u64::from_str_radix(start, 16).ok()?, name))
        });
        let (start, name) = entries.take_while(|&(start, _)| start <= address).last()?;
        Some((name, address - start))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_names() {
        let guest = Guest { program: &[], map: "200000 _start\n200010 a::b\n200400 <T as c>::d\n" };
        assert_eq!(guest.function_at(0x1f_ffff), None);
        assert_eq!(guest.function_at(0x20_000f), Some(("_start", 15)));
        assert_eq!(guest.function_at(0x20_0010), Some(("a::b", 0)));
        assert_eq!(guest.function_at(u64::MAX), Some(("<T as c>::d", u64::MAX - 0x20_0400)));
    }

    #[test]
    fn programs_start_with_their_entry() {
        for guest in [INFO, CONVERT, CREATE, EDIT, QUERY] {
            let entry = u64::from_le_bytes(*guest.program[24..].first_chunk().expect("an ELF header"));
            assert_eq!(guest.function_at(entry), Some(("_start", 0)));
            assert!(guest.function_at(entry + 0x1000).is_some_and(|(name, _)| name != "_start"));
        }
    }
}
