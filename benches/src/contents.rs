use std::fs;
use std::path::Path;

/// Bytes of a cluster.
pub const UNIT: usize = 65536;
/// Clusters of each character.
const COUNT: usize = 64;

/// Clusters of real contents, half of them of programs and half of text: what lies in `/usr` here, or else this program itself.
pub fn contents() -> Vec<Vec<u8>> {
    let mut units = collect(Path::new("/usr/bin"), |unit| unit.contains(&0));
    units.extend(collect(Path::new("/usr/share"), |unit| !unit.contains(&0) && unit.is_ascii()));
    if units.is_empty() {
        let own = std::env::current_exe().and_then(fs::read).expect("a program can read itself");
        units.extend(own.chunks_exact(UNIT).take(2 * COUNT).map(<[u8]>::to_vec));
    }
    units
}

/// Up to [`COUNT`] clusters of the kind that is wanted, at most four of one file, in the order of names.
fn collect(root: &Path, wanted: impl Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let mut units = Vec::new();
    visit(root, &mut |bytes| {
        units.extend(bytes.chunks_exact(UNIT).filter(|unit| wanted(unit)).take(4).map(<[u8]>::to_vec));
        units.len() < COUNT
    });
    units.truncate(COUNT);
    units
}

/// Hands over file by file, until `more` says that it is enough; says whether it was not.
fn visit(folder: &Path, more: &mut dyn FnMut(&[u8]) -> bool) -> bool {
    let mut entries: Vec<_> = fs::read_dir(folder).into_iter().flatten().flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    entries.iter().all(|entry| match (entry.file_type(), entry.metadata()) {
        (Ok(kind), _) if kind.is_dir() => visit(&entry.path(), more),
        (Ok(kind), Ok(data)) if kind.is_file() && data.len() >= UNIT as u64 => {
            fs::read(entry.path()).map_or(true, |bytes| more(&bytes))
        }
        _ => true,
    })
}
