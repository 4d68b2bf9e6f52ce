//! Objects of JSON as QEMU prints the options of a node: in the order of its hash table.

use serde_json::Value;

/// Buckets of the table.
const BUCKETS: u32 = 512;

/// A member: its name, and its value in JSON.
pub type Member = (String, String);

/// A member that is a string.
pub fn text(name: &str, value: &str) -> Member {
    (name.to_owned(), Value::from(value).to_string())
}

/// The object of these members, whose names differ.
pub fn object(mut members: Vec<Member>) -> String {
    members.sort_by(|(a, _), (b, _)| (bucket(a), a).cmp(&(bucket(b), b)));
    let members: Vec<String> =
        members.iter().map(|(name, value)| format!("{}: {value}", Value::from(name.as_str()))).collect();
    format!("{{{}}}", members.join(", "))
}

/// Where the table keeps a member. The hash is that of the Trivial Database library.
pub fn bucket(name: &str) -> u32 {
    let seed = 0x238f_13af_u32.wrapping_mul(name.len() as u32);
    let hash =
        name.bytes().enumerate().fold(seed, |hash, (at, byte)| hash.wrapping_add(u32::from(byte) << (at * 5 % 24)));
    hash.wrapping_mul(1_103_515_243).wrapping_add(12345) % BUCKETS
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The order in names that qemu-img 10.0 prints.
    #[test]
    fn members_are_in_the_order_of_qemu() {
        let members =
            ["driver", "file", "size", "offset", "encrypt.key-secret", "header", "key-secret", "image", "align"];
        let members = members.map(|name| (name.to_owned(), "1".to_owned())).to_vec();
        assert_eq!(
            object(members),
            r#"{"offset": 1, "image": 1, "header": 1, "encrypt.key-secret": 1, "driver": 1, "size": 1, "file": 1, "key-secret": 1, "align": 1}"#
        );
        assert_eq!(object(vec![text("filename", "a\"b")]), r#"{"filename": "a\"b"}"#);
    }
}
