/// How far inflating came.
pub struct Inflated {
    /// Bytes written.
    pub len: usize,
    /// Whether the stream ended there; otherwise the output is full or the input used up.
    pub ended: bool,
}
